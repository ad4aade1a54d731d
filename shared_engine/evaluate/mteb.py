"""MTEB's tasks: a model that it takes, runs with a hub or a local copy, and the cards' figures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mteb
import numpy as np
from datasets import Dataset, Image
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.models import ModelMeta
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ScoringFunction
from mteb.types import PromptType
from numpy.typing import NDArray

from shared_engine.documents import EmbeddingInput, Role
from shared_engine.embedder import Embedder
from shared_engine.errors import ConfigurationError
from shared_engine.evaluate.data import Collection, RetrievalData, read_folder
from shared_engine.evaluate.models import WINDOW
from shared_engine.evaluate.search import decode
from shared_engine.options import Options


@dataclass(frozen=True)
class CardRow:
    """What a model card says: one Recall@5, the average of several data sets."""

    model: str
    tasks: tuple[str, ...]
    """MTEB's names of those that are public."""
    recall_at_5: float
    of: str
    """What the average is of, in the card's words."""
    subsets: tuple[str, ...] = ()


_300M = "nvidia/llama-3.2-nemoretriever-300m-embed-v2"
_VL = "nvidia/llama-3.2-nemoretriever-1b-vlm-embed-v1"
_MLQA = tuple(f"{name}-{name}" for name in ("ara", "deu", "eng", "hin", "spa", "vie", "zho"))
_VIDORE = tuple(
    f"Vidore{name}Retrieval"
    for name in (
        *("ArxivQA", "DocVQA", "InfoVQA", "Tabfquad", "Tatdqa", "ShiftProject"),
        *("SyntheticDocQAAI", "SyntheticDocQAEnergy", "SyntheticDocQAGovernmentReports"),
        "SyntheticDocQAHealthcareIndustry",
    )
)

CARDS = {
    "qa": CardRow(
        _300M, ("NQ", "HotpotQA", "FiQA2018"), 0.6292, "NQ, HotpotQA, FiQA, TechQA dataset"
    ),
    "miracl": CardRow(
        _300M,
        ("MIRACLRetrievalHardNegatives",),
        0.6612,
        "MIRACL (multilingual), an internal version with hard negatives",
    ),
    "mlqa": CardRow(
        _300M, ("MLQARetrieval",), 0.7591, "MLQA dataset with different languages", _MLQA
    ),
    "mldr": CardRow(_300M, ("MultiLongDocRetrieval",), 0.5327, "MLDR"),
    "vidore": CardRow(_VL, _VIDORE, 0.809, "DigitalCorpora-767, Earnings, ViDoRe V1"),
}
"""From the "Evaluation Results" of https://build.nvidia.com/nvidia/llama-3_2-nemoretriever-300m-\
embed-v2 (2025-10-02) and .../llama-3_2-nemoretriever-1b-vlm-embed-v1 (2025-06-25)."""


class MTEBModel(AbsEncoder):
    """A model that `mteb.evaluate` takes, with the options of an embedder.

    Queries are embedded as queries, and all else as documents. Integer and bit vectors are given
    as the float32 vectors that rank as they do.
    """

    def __init__(self, embedder: Embedder) -> None:
        self.embedder = embedder
        options = embedder.options
        name = options.model.strip("/").rpartition("/")[2] or "model"
        modalities = {part for kind in embedder.modalities for part in kind.split("_")}
        self.mteb_model_meta = ModelMeta.create_empty(
            {
                "name": options.model if options.model.count("/") == 1 else f"local/{name}",
                "revision": embedder.cache_key("document"),  # of MTEB's own results
                "embed_dim": embedder.dimensions,
                "similarity_fn_name": ScoringFunction.COSINE,
                "modalities": sorted(modalities),
            }
        )

    def encode(
        self,
        inputs: Iterable[dict[str, Any]],
        *,
        prompt_type: PromptType | None = None,
        **_: Any,
    ) -> NDArray[np.float32]:
        """Return vectors (n, dimensions) of MTEB's batches of texts, images, or both."""
        role: Role = "query" if prompt_type == PromptType.query else "document"
        options = self.embedder.options
        documents = (each for batch in inputs for each in _documents(batch))
        windows = list(self.embedder.stream(documents, role, batch_size=WINDOW))
        vectors = np.concatenate(windows) if windows else np.zeros((0, self.embedder.dimensions))
        return decode(vectors, self.embedder.dimensions, options.embedding_type)


def _documents(batch: dict[str, Any]) -> Iterator[EmbeddingInput]:
    texts, images = batch.get("text"), batch.get("image")
    for row in range(len(texts if texts is not None else images or ())):
        yield EmbeddingInput(
            texts[row] if texts is not None else None, images[row] if images is not None else None
        )


def run_tasks(
    names: Iterable[str], options: Options, folder: Path | None = None
) -> list[dict[str, Any]]:
    """Run tasks by MTEB's names, or those of rows of CARDS; return figures of each subset.

    With `folder`, a local copy in BEIR's layout is measured as the only task's data, in a subfolder
    by name of each subset where the task has several; else MTEB fetches from its hub.

    Raises:
        ConfigurationError: no such task, one that is no retrieval, or no such subset there.
    """
    tasks = [task for name in names for task in _find_tasks(name)]
    if folder is not None:
        if len(tasks) != 1:
            raise ConfigurationError(f"--data holds one task; {len(tasks)} are to run")
        tasks = [_use_folder(tasks[0], folder)]
    with Embedder(options) as embedder:
        model: Any = MTEBModel(embedder)  # takes less than MTEB's protocol names
        result = mteb.evaluate(model, tasks, cache=None, co2_tracker=False, show_progress_bar=False)
    return [
        {
            "task": found.task_name,
            "subset": score["hf_subset"],
            "split": split,
            "Recall@5": score["recall_at_5"],
            "nDCG@10": score["ndcg_at_10"],
        }
        for found in result.task_results
        for split, scores in found.scores.items()
        for score in scores
    ]


def write_tasks(rows: list[dict[str, Any]]) -> str:
    """Return figures as a table in Markdown, with what the model cards say of these tasks."""
    names = ("task", "subset", "split", "Recall@5", "nDCG@10")
    lines = [f"| {' | '.join(names)} |", "| --- | --- | --- | ---: | ---: |"]
    for row in rows:
        figures = (f"{row[name]:.4f}" for name in names[3:])
        lines.append(f"| {' | '.join([*(row[name] for name in names[:3]), *figures])} |")
    by_task: dict[str, list[float]] = {}
    for row in rows:
        by_task.setdefault(row["task"], []).append(row["Recall@5"])
    for card in CARDS.values():
        if measured := [task for task in card.tasks if task in by_task]:
            mean = np.mean([np.mean(by_task[task]) for task in measured])
            lines.append(
                f"\nAverage Recall@5 of {', '.join(measured)}: {mean:.4f} here. The card of "
                f"{card.model} says {card.recall_at_5:.4f}, its average on {card.of}."
            )
    return "\n".join(lines)


def _find_tasks(name: str) -> list[AbsTaskRetrieval]:
    row = CARDS.get(name)
    subsets = list(row.subsets) if row and row.subsets else None
    found = []
    for task_name in row.tasks if row else (name,):
        try:
            task = mteb.get_task(task_name, hf_subsets=subsets)
        except (KeyError, ValueError) as exc:
            raise ConfigurationError(f"--mteb {task_name}: {exc.args[0]}") from None
        if not isinstance(task, AbsTaskRetrieval):
            raise ConfigurationError(f"--mteb {task_name}: is a {task.metadata.type} task")
        found.append(task)
    return found


def _use_folder(task: AbsTaskRetrieval, folder: Path) -> AbsTaskRetrieval:
    """Return a task that is the same but for where its data comes from."""
    folders = {"default": folder}
    if task.metadata.is_multilingual:
        folders = {name: folder / name for name in task.hf_subsets if (folder / name).is_dir()}
    if not folders:
        raise ConfigurationError(
            f"{folder} has no folder of a subset of {task.metadata.name}; expected some of "
            f"{', '.join(task.hf_subsets)}"
        )
    split = task.eval_splits[0]

    def load_data(self: Any, **_: Any) -> None:
        self.dataset = {
            name: {split: _to_mteb(read_folder(path))} for name, path in folders.items()
        }
        self.data_loaded = True

    local: AbsTaskRetrieval = type(type(task).__name__, (type(task),), {"load_data": load_data})()
    local.hf_subsets, local._eval_splits = list(folders), [split]
    return local


def _to_mteb(data: RetrievalData) -> dict[str, Any]:
    def rows(collection: Collection) -> Dataset:
        columns: dict[str, list[Any]] = {"id": collection.ids}
        documents = list(collection.documents())
        if collection.has_texts:
            columns["text"] = [document.text or "" for document in documents]
        if collection.has_images:
            columns["image"] = [str(document.image) for document in documents]
        made = Dataset.from_dict(columns)
        return made.cast_column("image", Image()) if collection.has_images else made

    return {
        "corpus": rows(data.corpus),
        "queries": rows(data.queries),
        "relevant_docs": data.qrels,
        "top_ranked": None,
    }
