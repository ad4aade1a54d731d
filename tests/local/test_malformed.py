"""A checkpoint whose files are wrong is refused by name, or computes; nothing else happens."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from shared_engine import (
    CheckpointError,
    EmbeddingInput,
    ImageTooLargeError,
    Options,
    Request,
)
from shared_engine.local.backend import LocalBackend
from tests.support.checkpoints import PROMPTS, SHAPES, build_checkpoint
from tests.support.vl_checkpoints import VL_SHAPES, build_vl_checkpoint, page

NESTED: list[Any] = []
for _ in range(300):
    NESTED = [NESTED]
VALUES: list[Any] = [
    *(None, True, False, 0, 1, 2, 3, 7, -1, 10**6, 2**31, 2**63, 10**30, -(10**30)),
    *(0.0, 0.5, 1.0, -1.5, 1e-308, 1e308, float("nan"), float("inf"), -float("inf")),
    *("", "x", "64", "\ud800", "../../etc/passwd", [], [1], ["x"], {}, {"a": 1}, NESTED),
]
REMOVED = object()
Path_ = tuple[str | int, ...]


def leaves(content: Any, at: Path_ = ()) -> Iterator[Path_]:
    """Every place in a JSON document, objects and lists themselves too."""
    if at:
        yield at
    if isinstance(content, dict):
        for key, value in content.items():
            yield from leaves(value, (*at, key))
    elif isinstance(content, list) and len(content) < 10:
        for index, value in enumerate(content):
            yield from leaves(value, (*at, index))


def change(content: Any, at: Path_, value: Any) -> Any:
    """The document with another value in one place."""
    content = json.loads(json.dumps(content))
    inside = content
    for key in at[:-1]:
        inside = inside[key]
    if value is REMOVED:
        del inside[at[-1]]
    else:
        inside[at[-1]] = value
    return content


def embed(folder: Path) -> list[str]:
    """Embed some inputs with what is in the folder; return why it was refused, if it was."""
    try:
        backend = LocalBackend(Options(model=folder, device="cpu", dtype="float32"))
    except CheckpointError as exc:
        return [str(exc)]
    documents = [
        EmbeddingInput("a text"),
        EmbeddingInput(""),
        EmbeddingInput("a longer text, " * 30),
    ]
    if "image" in backend.modalities:
        documents += [EmbeddingInput("a caption", page(0, 90, 40))]
    rows = backend.submit(Request(documents, "document", truncate="END")).result(60)
    backend.close()
    assert {type(error) for error in rows.errors.values()} <= {ImageTooLargeError}
    assert np.isfinite(np.delete(rows.vectors, list(rows.errors), axis=0)).all()
    return []


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("malformed") / "text"
    shape = SHAPES["sharded"]
    return build_checkpoint(folder, shape, prompts=PROMPTS, matryoshka_dimensions=(16, 32))


@pytest.fixture(scope="module")
def vl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("malformed") / "vl"
    return build_vl_checkpoint(folder, VL_SHAPES["processor-config"])


FILES = [
    ("text", "config.json"),
    ("text", "config_sentence_transformers.json"),
    ("text", "sentence_bert_config.json"),
    ("text", "model.safetensors.index.json"),
    ("text", "modules.json"),
    ("text", "tokenizer.json"),
    ("vl", "config.json"),
    ("vl", "processor_config.json"),
    ("vl", "tokenizer.json"),
]


@pytest.fixture(params=FILES, ids="-".join)
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """One of the JSON files of a copy of a checkpoint."""
    kind, name = request.param
    shutil.copytree(request.getfixturevalue(kind), tmp_path / kind)
    return tmp_path / kind / name


@pytest.mark.slow
@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_value_in_any_field_is_refused_or_computes(file: Path, data: st.DataObject) -> None:
    content = json.loads(file.read_text())
    places = [at for at in leaves(content) if at[:2] != ("model", "vocab")]
    at = data.draw(st.sampled_from(places))
    value = data.draw(st.sampled_from([*VALUES, REMOVED]))
    original = file.read_bytes()
    try:
        file.write_text(json.dumps(change(content, at, value)))
        assert all(str(file.parent) in said for said in embed(file.parent))
    finally:
        file.write_bytes(original)


@pytest.mark.slow
@pytest.mark.parametrize("value", [*VALUES, REMOVED], ids=lambda value: ascii(value)[:20])
def test_every_value_in_every_field_of_config_json(text, vl, tmp_path, value):
    for kind in (text, vl):
        folder = tmp_path / kind.name
        shutil.copytree(kind, folder)
        content = json.loads((folder / "config.json").read_text())
        for at in leaves(content):
            (folder / "config.json").write_text(json.dumps(change(content, at, value)))
            assert all(str(folder) in said for said in embed(folder))


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[1]", b"7", b"null", b"\xff\xfe", b"[" * 10**5, b'{"a":' * 10**5, b"9" * 10**5],
    ids=lambda content: ascii(content[:8]),
)
def test_a_value_that_is_not_an_object_is_refused(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=file.name):
        LocalBackend(Options(model=file.parent, device="cpu"))


@pytest.mark.parametrize(
    ("at", "value", "said"),
    [
        (("rope_scaling", "factor"), 0, "rope_scaling.factor is 0; expected a number greater"),
        (("rope_scaling", "high_freq_factor"), 1.0, "expected more than low_freq_factor"),
        (("rope_theta",), float("nan"), "rope_theta is nan; expected a"),
        (("max_position_embeddings",), -5, "max_position_embeddings is -5; expected a number"),
        (("max_position_embeddings",), 10**12, "max_position_embeddings is 1000000000000"),
        (("num_key_value_heads",), 0, "num_key_value_heads is 0; expected a number"),
        (("head_dim",), 0, "head_dim is 0; expected"),
        (("bos_token_id",), 512, "bos_token_id is 512; expected less than vocab_size"),
        (("rms_norm_eps",), -1e-5, "rms_norm_eps is -1e-05; expected"),
        (("matryoshka_dimensions",), [16, 0], "matryoshka_dimensions.1 is 0"),
        (("vocab_size",), REMOVED, "vocab_size is missing"),
    ],
)
def test_an_invalid_value_is_named(text, tmp_path, at, value, said):
    shutil.copytree(text, tmp_path / "copy")
    path = tmp_path / "copy" / "config.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()), at, value)))
    with pytest.raises(CheckpointError, match=said) as refused:
        LocalBackend(Options(model=path.parent, device="cpu"))
    assert str(path) in str(refused.value)


@pytest.mark.parametrize("limit", [0, -1, 3.5, "512", True])
def test_an_invalid_limit_is_named(text, tmp_path, limit):
    shutil.copytree(text, tmp_path / "copy")
    path = tmp_path / "copy" / "sentence_bert_config.json"
    path.write_text(json.dumps({"max_seq_length": limit}))
    with pytest.raises(CheckpointError, match=f"{path.name}: max_seq_length is {limit!r}"):
        LocalBackend(Options(model=path.parent, device="cpu"))


@pytest.mark.parametrize(
    "name",
    [
        "../model.safetensors",
        "a/../../b",
        "/etc/passwd",
        "C:\\model",
        "\\\\host\\a",
        "..\\b",
        "",
        ".",
    ],
)
def test_a_weight_file_that_leaves_the_folder_is_refused(text, tmp_path, name):
    shutil.copytree(text, tmp_path / "copy")
    path = tmp_path / "copy" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["norm.weight"] = name
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"weight_map.* in the folder"):
        LocalBackend(Options(model=path.parent, device="cpu"))


@pytest.mark.parametrize(
    "dtype",
    [torch.int8, torch.uint8, torch.int64, torch.bool, torch.float8_e4m3fn, torch.complex64],
)
@pytest.mark.parametrize("kind", ["text", "vl"])
def test_weights_of_another_dtype_are_refused(request, tmp_path, kind, dtype):
    shutil.copytree(request.getfixturevalue(kind), tmp_path / "copy")
    path = max((tmp_path / "copy").glob("*.safetensors"))
    weights = load_file(path)
    name = next(name for name in weights if name.endswith("proj.weight"))
    save_file(weights | {name: torch.ones(weights[name].shape).to(dtype)}, path)
    with pytest.raises(CheckpointError, match=f"{name}.* has dtype {dtype}; expected one of"):
        LocalBackend(Options(model=path.parent, device="cpu"))


def test_a_duplicate_tensor_is_refused(text, tmp_path):
    shutil.copytree(text, tmp_path / "copy")
    path = max((tmp_path / "copy").glob("*.safetensors"))
    weights = load_file(path)
    name = next(iter(weights))
    save_file(weights | {f"model.{name}": weights[name] + 1}, path)
    with pytest.raises(CheckpointError, match=f"{name}.*which is a duplicate"):
        LocalBackend(Options(model=path.parent, device="cpu"))


@pytest.mark.parametrize("cut", [0, 4, 100, -1])
def test_a_truncated_weight_file_is_refused(text, tmp_path, cut):
    shutil.copytree(text, tmp_path / "copy")
    path = max((tmp_path / "copy").glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(CheckpointError, match=path.name):
        LocalBackend(Options(model=path.parent, device="cpu"))


@pytest.mark.parametrize("where", ["template", "vocabulary"])
def test_a_token_beyond_the_table_is_refused(text, tmp_path, where):
    """It would fail every text of its step, and end a GPU."""
    shutil.copytree(text, tmp_path / "copy")
    path = tmp_path / "copy" / "tokenizer.json"
    content = json.loads(path.read_text())
    if where == "vocabulary":
        content["model"]["vocab"]["zz"] = 999
    else:
        for processor in content["post_processor"]["processors"]:
            for token in processor.get("special_tokens", {}).values():
                token["ids"] = [999]
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="token with id 999; expected ids below 51"):
        LocalBackend(Options(model=path.parent, device="cpu"))
