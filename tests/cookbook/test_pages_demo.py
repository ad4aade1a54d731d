"""`make pages ARGS=--terminal`, and the stand-in that it runs where there is no public model."""

from __future__ import annotations

import doctest
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import demo
import handbook
import numpy as np
import pytest
import rag
import relevance
import sections
from pages import access, app, files, passages, terminal
from pages.__main__ import main
from safetensors import safe_open

from cookbook.standin import build_multimodal
from shared_engine import Embedder, EmbeddingInput, Options, Reranker, RerankOptions
from tests.support import pdfs
from tests.support.rerankers import build_reranker, build_vl_reranker
from tests.support.vl_checkpoints import VLShape, build_vl_checkpoint


@pytest.fixture(scope="module")
def multimodal(standin: Path) -> Path:
    """The stand-in for images, built around the one for texts."""
    return build_multimodal()


@pytest.fixture
def run(
    multimodal: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., str]:
    """Run the script with a store of its own and no public model at hand; return what it prints."""
    for name in ("NVIDIA_BASE_URL", "NVIDIA_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    def run(*args: str) -> str:
        main([*args, "--terminal", "--device", "cpu", "--store", str(tmp_path / "store")])
        return capsys.readouterr().out

    return run


def test_a_key_of_the_environment_sends_nothing_to_the_catalogue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NVIDIA_API_KEY", "nvapi-1")
    monkeypatch.delenv("NVIDIA_BASE_URL", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    default = replace(terminal.DEFAULT, build=lambda: tmp_path)
    assert terminal.choose_model(None, default)[0] == {"model": str(tmp_path)}


@pytest.mark.slow
def test_finds_pages_by_their_pictures_in_both_frameworks_and_embeds_nothing_twice(
    run: Callable[..., str],
) -> None:
    first = run("--limit", "6")
    assert "is not to be had" in first
    assert "stand-in" in first
    assert "its vision tower is random" in first
    assert "6 of files.pdf" in first
    assert "6 embedded" in first
    assert len(re.findall("the right page: rank 1, .* ahead of the next\n", first)) == 3
    assert not re.search("nan|behind| and rank | and not", first)  # both frameworks, the same

    second = run("--limit", "6", "--question", "How do I read a ZIP archive?")
    assert "0 embedded, 6 unchanged, 0 removed" in second
    answers = second.partition("How do I read a ZIP archive?\n")[2]
    assert len(re.findall(r"^ +-?0\.\d{3} +-?0\.\d{3} +files.pdf, page \d$", answers, re.M)) == 3


@pytest.mark.slow
def test_embeds_what_is_new_or_changed_and_forgets_what_is_gone(
    run: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "mine"
    monkeypatch.setattr("handbook.CHAPTERS", {"a": ("wave", "uuid"), "b": ("json",)})
    a, b = handbook.write(folder)
    args = ("--pdf", str(folder), "--max-tiles", "1")
    assert "3 embedded" in run(*args)
    a.write_bytes(b.read_bytes())
    (folder / "broken.pdf").write_bytes(b"not a PDF")
    output = run(*args)
    assert re.search("Skipped +broken.pdf is neither a PDF nor", output)
    assert re.search("1 embedded .*, 1 unchanged, 2 removed", output)
    assert len(list((tmp_path / "store").rglob("*.png"))) == 2


def test_a_broken_page_is_skipped_and_the_others_are_searched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("NVIDIA_BASE_URL", raising=False)
    model = build_vl_checkpoint(tmp_path / "vl", VLShape(image_size=64))
    text = pdfs.Leaf("BT /F1 9 Tf 9 9 Td (words) Tj ET")
    content = pdfs.write(text, text)
    broken = content.replace(b"5 0 obj <</Type/Page/", b"5 0 obj <</Type/")
    (tmp_path / "a.pdf").write_bytes(broken)
    arguments = ["--terminal", "--device", "cpu", "--model", str(model)]
    arguments += ["--pdf", str(tmp_path / "a.pdf"), "--store", str(tmp_path / "store")]
    for added in (1, 0):
        main(arguments)
        output = capsys.readouterr().out
        assert re.search("Skipped +a.pdf, page 2,", output)
        assert f"\n{added} embedded" in output
        assert "a.pdf, page 1: smaller" in output
        assert "page 2: smaller" not in output


def test_both_frameworks_rerank_what_is_asked_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("NVIDIA_BASE_URL", raising=False)
    model = build_vl_checkpoint(tmp_path / "vl", VLShape(image_size=64))
    reranker = build_vl_reranker(tmp_path / "reranker", VLShape(image_size=64))
    (tmp_path / "a.pdf").write_bytes(pdfs.scan(*(f"page {letter}" for letter in "abcdef")))
    arguments = ["--terminal", "--device", "cpu", "--model", str(model), "--question", "sound"]
    arguments += ["--pdf", str(tmp_path / "a.pdf"), "--store", str(tmp_path / "store")]
    main([*arguments, "--rerank", str(reranker)])
    output = capsys.readouterr().out
    assert re.search(r"Rerank +\S+/reranker\s+in\s+this\s+process", output)

    drawn = {page.name: page.render(terminal.PIXELS) for page in terminal.read_pages(tmp_path)}
    pictures = [EmbeddingInput(image=picture) for picture in drawn.values()]
    with Embedder(Options(model=str(model), device="cpu", truncate="END")) as embedder:
        cosines = embedder.embed(pictures) @ embedder.embed(["sound"], "query")[0]
    before = np.argsort(-cosines).tolist()
    with Reranker(RerankOptions(model=str(reranker), device="cpu")) as engine:
        best = [index for index, _ in engine.rank("sound", pictures, terminal.TOP)]
    wanted = [(f"{cosines[n]:.3f}", list(drawn)[n], str(before.index(n) + 1)) for n in best]
    answers = output.partition("  sound\n")[2]
    shown = r"^ +(-?\d\.\d{3}) +(-?\d\.\d{3}) +(a.pdf, page \d)\n +was (\d)"
    found = re.findall(shown, answers, re.M)
    assert [(left, name, rank) for left, _, name, rank in found] == wanted
    assert all(left == right for left, right, *_ in found)

    for lowest, is_answered in (("-1000", True), ("1000", False)):
        for more in ([], ["--rerank", str(reranker)]):
            main([*arguments, *more, "--min-score", lowest])
            assert (relevance.NO_ANSWER not in capsys.readouterr().out) == is_answered

    text = build_reranker(tmp_path / "text")
    with pytest.raises(SystemExit, match="takes texts only"):
        main([*arguments, "--rerank", str(text)])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--pdf", "nowhere.pdf"], "nowhere.pdf"),
        (["--pdf", "."], "no page of a PDF"),
        (["--max-tiles", "13"], "2"),
    ],
)
def test_what_can_be_expected_to_fail_ends_in_a_sentence(
    run: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    args: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message):
        run(*args)


@pytest.mark.parametrize(
    "module", [access, app, demo, files, passages, rag, relevance, sections, terminal]
)
def test_its_examples_hold(module: ModuleType) -> None:
    found = doctest.testmod(module)
    assert found.attempted
    assert not found.failed


def test_the_standin_for_images_is_laid_out_as_the_public_one_and_says_what_it_is(
    multimodal: Path, tmp_path: Path
) -> None:
    again = build_multimodal(tmp_path / "again")
    assert (again / "standin.json").read_bytes() == (multimodal / "standin.json").read_bytes()
    with safe_open(again / "model.safetensors", "pt") as file:
        names = list(file.keys())
    for name in (
        "vision_model.vision_model.embeddings.patch_embedding.weight",
        "mlp1.3.weight",
        "language_model.layers.0.self_attn.q_proj.weight",
    ):
        assert name in names
    assert "random" in json.loads((again / "config.json").read_text())["stand_in"]
    assert "random" in (again / "README.md").read_text()
    with Embedder(Options(model=str(multimodal), device="cpu")) as embedder:
        assert "random-vision-standin" in embedder.description

    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="holds something else"):
        build_multimodal(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "source", ["handbook", pytest.param("nvidia-pages", marks=pytest.mark.data("nvidia-pages"))]
)
def test_the_standin_finds_every_page_by_an_altered_picture_of_it(
    multimodal: Path, tmp_path: Path, data: Path, source: str
) -> None:
    if source == "handbook":
        handbook.write(tmp_path)
    found = terminal.read_pages(tmp_path if source == "handbook" else data / source)
    assert len(found) >= 10
    alter = list(terminal.ALTERATIONS.values())
    altered = [
        alter[row % len(alter)](page.render(terminal.PIXELS_SENT)) for row, page in enumerate(found)
    ]
    with Embedder(Options(model=str(multimodal), device="cpu")) as embedder:
        stored = embedder.embed(
            [EmbeddingInput(image=page.render(terminal.PIXELS)) for page in found]
        )
        scores = embedder.embed([EmbeddingInput(image=picture) for picture in altered]) @ stored.T
    own = scores.diagonal().copy()
    np.fill_diagonal(scores, -1)
    assert (own - scores.max(axis=1)).min() > 0.005
