"""MTEB: a model for `mteb.evaluate`, its tasks with data from the hub or a folder, model cards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

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
from shared_engine.evaluate.data import Collection, find_split, read_folder
from shared_engine.evaluate.models import WINDOW
from shared_engine.evaluate.report import format_table
from shared_engine.evaluate.search import decode
from shared_engine.options import Options


class CardRow(NamedTuple):
    """A figure of a model card: Recall@5, averaged over several data sets."""

    model: str
    tasks: tuple[str, ...]
    """MTEB's names of the public data sets."""
    recall_at_5: float
    of: str
    """The data sets, in the card's words."""
    subsets: tuple[str, ...] | None = None


_300M = "nvidia/llama-3.2-nemoretriever-300m-embed-v2"
_VL = "nvidia/llama-3.2-nemoretriever-1b-vlm-embed-v1"
_HARD = "MIRACL (multilingual), an internal version with hard negatives"
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
    "qa": CardRow(_300M, ("NQ", "HotpotQA", "FiQA2018"), 0.6292, "NQ, HotpotQA, FiQA, TechQA"),
    "miracl": CardRow(_300M, ("MIRACLRetrievalHardNegatives",), 0.6612, _HARD),
    "mlqa": CardRow(_300M, ("MLQARetrieval",), 0.7591, "MLQA with different languages", _MLQA),
    "mldr": CardRow(_300M, ("MultiLongDocRetrieval",), 0.5327, "MLDR"),
    "vidore": CardRow(_VL, _VIDORE, 0.809, "DigitalCorpora-767, Earnings, ViDoRe V1"),
}
"""From the "Evaluation Results" of https://build.nvidia.com/nvidia/llama-3_2-nemoretriever-300m-\
embed-v2 (2025-10-02) and .../llama-3_2-nemoretriever-1b-vlm-embed-v1 (2025-06-25)."""


class MTEBModel(AbsEncoder):
    """A model for `mteb.evaluate`, with the options of an embedder.

    Queries are embedded as queries, everything else as documents. Integer and bit vectors become
    the float32 vectors that `nemoretriever evaluate` ranks them by.
    """

    def __init__(self, embedder: Embedder) -> None:
        self.embedder = embedder
        revision = embedder.cache_key("document")  # first, as it asks a server for the model's name
        name = embedder.model or ""
        if name.count("/") != 1:  # MTEB requires owner/name
            name = f"local/{name.strip('/').rpartition('/')[2] or 'model'}"
        modalities = {part for kind in embedder.modalities for part in kind.split("_")}
        self.mteb_model_meta = ModelMeta.create_empty(
            {
                "name": name,
                "revision": revision,  # identifies MTEB's stored results
                "embed_dim": embedder.dimensions,
                "similarity_fn_name": ScoringFunction.DOT_PRODUCT,  # exact for bits, so ties stay
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
        dimensions = self.embedder.dimensions
        documents = (document for batch in inputs for document in _read_batch(batch))
        windows = list(self.embedder.stream(documents, role, batch_size=WINDOW))
        vectors = np.concatenate(windows) if windows else np.zeros((0, dimensions))
        return decode(vectors, dimensions, self.embedder.options.embedding_type)


def _read_batch(batch: dict[str, Any]) -> Iterator[EmbeddingInput]:
    size = len(next(batch[name] for name in ("text", "image") if name in batch))
    texts, images = (batch.get(name, [None] * size) for name in ("text", "image"))
    return map(EmbeddingInput, texts, images)


def run_tasks(
    names: Iterable[str], options: Options, folder: Path | None = None
) -> list[dict[str, Any]]:
    """Run tasks of MTEB and return the figures of each subset.

    Args:
        names: MTEB's names of tasks, or keys of CARDS.
        options: The model, and the size and type of its vectors.
        folder: Data of the only task in BEIR's layout, instead of MTEB's hub. A task with subsets
            has a subfolder for each; missing ones are skipped. The splits of the task that it
            has are measured; if it has none, "test" or the only one, under its own name.

    Raises:
        ConfigurationError: a task is unknown or is not a retrieval task, or its data is missing.
    """
    tasks = [task for name in names for task in _find_tasks(name)]
    if folder is not None:
        if len(tasks) != 1:
            raise ConfigurationError(f"--data is for one task, but {len(tasks)} are selected")
        tasks = [_use_folder(tasks[0], folder)]
    with Embedder(options) as embedder:
        model: Any = MTEBModel(embedder)  # accepts any keyword, where MTEB's protocol lists them
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


def write_tasks(rows: Sequence[dict[str, Any]]) -> str:
    """Return figures of tasks as a Markdown table, with those of the model cards."""
    texts = ("task", "subset", "split")
    lines = [
        format_table(
            [{name: v if name in texts else f"{v:.4f}" for name, v in row.items()} for row in rows]
        )
    ]
    for card in CARDS.values():
        found = [[row["Recall@5"] for row in rows if row["task"] == task] for task in card.tasks]
        if means := [np.mean(values) for values in found if values]:
            measured = [task for task, values in zip(card.tasks, found, strict=True) if values]
            lines.append(
                f"Average Recall@5 of {', '.join(measured)}: {np.mean(means):.4f}. Model card of "
                f"{card.model}: {card.recall_at_5:.4f}, averaged over {card.of}."
            )
    return "\n\n".join(lines)


def _find_tasks(name: str) -> Iterator[AbsTaskRetrieval]:
    row = CARDS.get(name)
    for task_name in row.tasks if row else (name,):
        try:
            task = mteb.get_task(task_name, hf_subsets=row and row.subsets)
        except (KeyError, ValueError) as exc:
            raise ConfigurationError(f"--mteb {task_name}: {exc.args[0]}") from None
        if not isinstance(task, AbsTaskRetrieval):
            raise ConfigurationError(
                f"--mteb {task_name}: expected a retrieval task, not {task.metadata.type}"
            )
        yield task


def _use_folder(task: AbsTaskRetrieval, folder: Path) -> AbsTaskRetrieval:
    """Return the same task with data from a folder."""
    folders = {"default": folder}
    if task.metadata.is_multilingual:
        folders = {name: folder / name for name in task.hf_subsets if (folder / name).is_dir()}
    if not folders:
        raise ConfigurationError(
            f"{folder} has no subfolder for a subset of {task.metadata.name}; expected some of "
            f"{', '.join(task.hf_subsets)}"
        )
    paths = list(folders.values())
    splits = [
        split
        for split in task.eval_splits
        if all((path / "qrels" / f"{split}.tsv").exists() for path in paths)
    ] or [find_split(paths[0]).stem]

    def load_data(self: Any, **_: Any) -> None:
        self.dataset = {}
        for (name, path), split in product(folders.items(), splits):
            data = read_folder(path, split)
            self.dataset.setdefault(name, {})[split] = {
                "corpus": _make_dataset(data.corpus),
                "queries": _make_dataset(data.queries),
                "relevant_docs": data.qrels,
                "top_ranked": None,
            }
        self.data_loaded = True

    local: AbsTaskRetrieval = type(type(task).__name__, (type(task),), {"load_data": load_data})()
    local.hf_subsets = list(folders)
    return local.filter_eval_splits(splits)


def _make_dataset(collection: Collection) -> Dataset:
    columns = {"id": collection.ids, "text": list(collection.texts)}
    if not collection.has_images:
        return Dataset.from_dict(columns)
    images = [document.image for document in collection.inputs.values()]
    columns["image"] = [image and str(image) for image in images]
    return Dataset.from_dict(columns).cast_column("image", Image())
