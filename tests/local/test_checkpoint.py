"""Names, folders and config files: what is found, and what is refused by name."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from shared_engine import CATALOGUE, CheckpointError, Embedder, Options, UnsupportedDimensionsError
from shared_engine.catalogue import DEFAULT_MODEL, lookup
from shared_engine.local import checkpoint as checkpoint_module
from shared_engine.local.backend import LocalBackend
from shared_engine.local.checkpoint import resolve
from shared_engine.local.fingerprint import digest_files, list_files
from tests.support.checkpoints import PROMPTS, SHAPES, build_checkpoint


def edit(folder: Path, **changes: object) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@pytest.fixture
def copy(checkpoint, tmp_path) -> Path:
    shutil.copytree(checkpoint, tmp_path / "copy")
    return tmp_path / "copy"


def test_every_name_leads_to_one_row():
    names = [name for spec in CATALOGUE for name in (spec.name, *spec.aliases)]
    assert len(names) == len(set(names))
    for spec in CATALOGUE:
        for name in (spec.name, *spec.aliases):
            assert lookup(name) is lookup(name.removeprefix("nvidia/")) is spec
    assert lookup(DEFAULT_MODEL).checkpoint


def test_a_model_without_public_weights_names_the_alternatives():
    for name in ("nvidia/llama-3.2-nemoretriever-300m-embed-v2", "llama-nemotron-embed-300m-v2"):
        with pytest.raises(CheckpointError, match=r"checkpoint='/path.*" + DEFAULT_MODEL):
            Embedder(Options(model=name)).embed(["x"])


@pytest.mark.parametrize("model", ["./nowhere", "/nowhere/at/all", "just-a-word", "a/b/c"])
def test_an_invalid_model_name_is_refused_without_the_network(model):
    with pytest.raises(CheckpointError, match="is not a local folder"):
        resolve(Options(model=model))


def test_a_commit_that_is_in_the_cache_is_used_without_a_network(tmp_path, python):
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = tmp_path / "hub" / "models--some--model" / "snapshots" / commit
    build_checkpoint(folder)
    program = f"""
import os
os.environ |= {{"HF_HOME": {str(tmp_path)!r}, "HF_HUB_OFFLINE": "0"}}
import socket
def refuse(*_, **__):
    raise OSError("the network was asked")
socket.getaddrinfo = refuse
from shared_engine import Embedder, Options
print(Embedder(Options(model="some/model", revision={commit!r})).embed(["x"]).shape)
"""
    assert python(program) == "(1, 64)\n"


def test_an_interrupted_download_is_not_a_checkpoint(tmp_path):
    folder = build_checkpoint(tmp_path / "sharded", SHAPES["sharded"])
    assert checkpoint_module._is_complete(folder)
    next(folder.glob("model-00002*")).unlink()
    assert not checkpoint_module._is_complete(folder)


def test_without_a_network_cached_checkpoints_load_and_others_fail_fast(tmp_path, python):
    home = tmp_path / "hub" / "models--some--model"
    build_checkpoint(home / "snapshots" / ("0" * 40))
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("0" * 40)
    program = f"""
import os, socket, time
os.environ |= {{"HF_HOME": {str(tmp_path)!r}, "HF_HUB_OFFLINE": "0", "NVIDIA_API_KEY": "nvapi-1"}}
asked = []
def refuse(*_, **__):
    asked.append(time.monotonic())
    raise OSError("the network is down")
socket.getaddrinfo = refuse
from shared_engine import CheckpointError, Embedder, Options
print(Embedder(Options(model="some/model")).embed(["x"]).shape)
try:
    Embedder(Options(model="some/other")).embed(["x"])
except CheckpointError as exc:
    print('backend="nim"' in str(exc), asked[-1] - asked[0] < 5)
"""
    assert python(program) == "(1, 64)\nTrue True\n"


def test_an_unreachable_hub_is_a_clear_error():
    with pytest.raises(CheckpointError, match=r"cannot download 'nobody/nothing'.*local folder"):
        resolve(Options(model="nobody/nothing"))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("architectures", ["LlamaForCausalLM"]),
        ("architectures", None),
        ("hidden_size", "64"),
        ("num_hidden_layers", 0),
        ("num_key_value_heads", 3),
        ("pooling", "cls"),
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("quantization_config", {"quant_method": "modelopt", "quant_algo": "NVFP4"}),
        ("rope_scaling", {"rope_type": "yarn", "factor": 2.0}),
    ],
)
def test_a_config_the_engine_does_not_compute_is_refused_by_field(copy, field, value):
    with pytest.raises(CheckpointError, match=field):
        resolve(Options(model=edit(copy, **{field: value})))


def test_a_named_model_must_have_the_size_of_its_row(copy):
    with pytest.raises(CheckpointError, match=r"hidden_size is 64; expected 2048"):
        resolve(Options(model="llama-nemotron-embed-300m-v2", checkpoint=copy))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_missing_or_broken_file_is_named(copy, name):
    (copy / name).write_bytes(b"{ broken")
    with pytest.raises(CheckpointError, match=name):
        Embedder(Options(model=copy)).embed(["x"])
    (copy / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        Embedder(Options(model=copy)).embed(["x"])


def test_missing_unknown_and_misshapen_tensors_are_named(copy):
    from safetensors.torch import load_file, save_file

    def weights_with(**changes):
        weights = load_file(copy / "model.safetensors") | changes
        kept = {name: tensor for name, tensor in weights.items() if tensor is not None}
        save_file(kept, copy / "model.safetensors", metadata={"format": "pt"})

    norm = load_file(copy / "model.safetensors")["norm.weight"]
    for changes, message in [
        ({"surprise.weight": norm}, r"1 tensors that config.json does not.*surprise\.weight"),
        ({"surprise.weight": None, "norm.weight": norm[:-1].clone()}, r"norm\.weight.*shape"),
        ({"norm.weight": None}, r"no tensor 'norm\.weight'"),
    ]:
        weights_with(**changes)
        with pytest.raises(CheckpointError, match=message):
            Embedder(Options(model=copy)).embed(["x"])


def test_prompts_and_limits_come_from_the_sentence_transformers_files(copy):
    path = copy / "config_sentence_transformers.json"
    path.write_text(json.dumps({"prompts": {"query": "Q> ", "document": ""}}))
    (copy / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 77}))
    found = resolve(Options(model=copy))
    assert found.prompts == {"query": "Q> ", "document": ""}
    assert found.max_tokens == 77
    assert resolve(Options(model=copy, max_tokens=50)).max_tokens == 50
    path.unlink()
    assert resolve(Options(model=copy)).prompts == {"query": "query: ", "document": "passage: "}


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("1_Pooling/config.json", {"pooling_mode_cls_token": True}, "pooling_mode_cls_token is T"),
        ("1_Pooling/config.json", {"pooling_mode_lasttoken": True}, "pooling_mode_lasttoken"),
        ("1_Pooling/config.json", {"pooling_mode_mean_tokens": False}, "pooling_mode_mean_tokens"),
        ("1_Pooling/config.json", {"pooling_mode": "max"}, "pooling_mode is 'max'"),
        ("1_Pooling/config.json", {"pooling_mode": ["mean", "cls"]}, "pooling_mode is"),
        ("1_Pooling/config.json", {"include_prompt": False}, "include_prompt is False"),
        ("modules.json", [{"type": "a.Transformer"}, {"type": "models.Dense"}], "not models.Dense"),
        ("modules.json", [{"type": "a.Transformer"}, {}], r"1\.type is missing"),
        ("modules.json", {"type": "a.Transformer"}, "expected a valid array"),
        ("sentence_bert_config.json", {"do_lower_case": True}, "do_lower_case is True"),
    ],
)
def test_unsupported_settings_of_sentence_transformers_are_refused(tmp_path, file, content, said):
    folder = build_checkpoint(tmp_path / "st", SHAPES["sentence-transformers"])
    assert resolve(Options(model=folder))
    (folder / file).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=said) as refused:
        resolve(Options(model=folder))
    assert str(folder / file) in str(refused.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": None, "rope_parameters": {"full_attention": {"rope_type": "llama3"}}},
        {"rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}},
        {"rope_scaling": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        {"partial_rotary_factor": 0.5},
        {"is_causal": True},
        {"use_bidirectional_attention": False},
    ],
    ids=ascii,
)
def test_fields_of_other_models_are_refused(copy, changes):
    with pytest.raises(CheckpointError, match=str([*changes][-1])):
        resolve(Options(model=edit(copy, **changes)))


def test_one_weight_file_precedes_an_index_as_in_transformers(tmp_path):
    folder = build_checkpoint(tmp_path / "both", SHAPES["sharded"])
    one = build_checkpoint(tmp_path / "one", SHAPES["gqa"], seed=1)
    shutil.copy(one / "model.safetensors", folder)
    vectors = [Embedder(Options(model=path)).embed(["x"]) for path in (folder, one)]
    assert (vectors[0] == vectors[1]).all()


@pytest.mark.parametrize(
    "name", ["config_sentence_transformers.json", "sentence_bert_config.json", "modules.json"]
)
def test_a_dangling_link_is_not_a_missing_file(copy, name):
    (copy / name).unlink(missing_ok=True)
    (copy / name).symlink_to(copy / "gone")
    with pytest.raises(CheckpointError, match=name):
        resolve(Options(model=copy))


@pytest.mark.parametrize("model", ["a" * 5000, "~nobody-of-this-name/x/y", "a\0b", "/" + "a" * 300])
def test_a_name_that_no_file_can_have_is_refused(model):
    with pytest.raises(CheckpointError, match="is not a local folder"):
        resolve(Options(model=model))


def test_a_shard_whose_name_no_file_can_have_is_refused(tmp_path):
    folder = build_checkpoint(tmp_path / "sharded", SHAPES["sharded"])
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["norm.weight"] = "a" * 5000
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="has no aaa"):
        Embedder(Options(model=folder)).embed(["x"])


def test_a_tokenizer_with_dropout_is_refused(copy):
    path = copy / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["dropout"] = 0.1
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"model.dropout is 0.1.*expected null"):
        Embedder(Options(model=copy)).embed(["x"])


def test_dimensions_are_those_declared(copy):
    edit(copy, matryoshka_dimensions=[8, 32])
    assert resolve(Options(model=copy)).dimensions == (8, 32, 64)
    for size in (8, 32, 64):
        assert Embedder(Options(model=copy, dimensions=size)).embed(["x"]).shape == (1, size)
    with pytest.raises(UnsupportedDimensionsError, match=r"dimensions=16.*8, 32, 64"):
        Embedder(Options(model=copy, dimensions=16)).embed(["x"])


def test_a_local_folder_needs_no_network_no_remote_code_and_no_stdin(tmp_path):
    """With sockets refused, stdin closed and `auto_map` pointing at code that would be seen."""
    folder = build_checkpoint(tmp_path / "trap", SHAPES["gqa"])
    assert "auto_map" in json.loads((folder / "config.json").read_text())
    (folder / "llama_bidirectional_model.py").write_text("raise SystemExit('remote code ran')")
    program = (
        "import socket, sys\n"
        "def refuse(*_): raise SystemExit('the network was used')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "from shared_engine import Embedder, Options\n"
        f"print(Embedder(Options(model={str(folder)!r})).embed(['x']).shape)\n"
        "assert 'transformers' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=Path(__file__).parents[1],
        env=os.environ | {"HF_HUB_OFFLINE": "0"},
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "(1, 64)\n", "")


# What a cache of vectors is keyed by


def flip(path: Path, at: int) -> None:
    content, time = bytearray(path.read_bytes()), path.stat().st_mtime_ns
    content[at] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(time + 1, time + 1))  # a clock may be too coarse for two writes


def digest(folder: Path) -> str:
    return digest_files(folder, list_files(folder))


def fingerprint(folder: Path, **options: Any) -> str:
    backend = LocalBackend(Options(model=folder, device="cpu", dtype="float32", **options))
    backend.close()
    return backend.fingerprint


@pytest.mark.parametrize("where", [0.0, 0.1234, 0.5, 0.777, 1.0])
def test_every_byte_of_the_weights_is_in_the_digest(copy, where):
    before = digest(copy)
    assert digest(copy) == before
    path = copy / "model.safetensors"
    flip(path, round(where * (path.stat().st_size - 1)))
    assert digest(copy) != before


def test_a_file_of_equal_size_and_time_has_another_digest(copy):
    """As tools leave it that copy a file with its times."""
    path = copy / "model.safetensors"
    seen, time = [digest(copy)], path.stat().st_mtime_ns
    for replaces in (False, True):
        content = bytearray(path.read_bytes())
        content[-1] ^= 1 + replaces
        written = path.with_suffix(".part") if replaces else path
        written.write_bytes(content)
        os.utime(written, ns=(time, time))
        written.replace(path)
        seen.append(digest(copy))
    assert len(set(seen)) == 3


def test_files_that_were_changed_after_they_were_loaded_give_no_key(copy):
    backend = LocalBackend(Options(model=copy, device="cpu"))
    flip(copy / "model.safetensors", -1)
    with pytest.raises(CheckpointError, match="changed after they were loaded"):
        _ = backend.fingerprint
    backend.close()
    again = LocalBackend(Options(model=copy, device="cpu"))
    key = again.fingerprint
    flip(copy / "model.safetensors", -1)
    assert again.fingerprint == key  # of what it computes with
    again.close()


def test_the_digest_covers_every_byte(copy):
    path = copy / "model.safetensors"
    digests = set()
    contents = (b"0123456789", b"5678901234", b"01234567890", b"012345678", b"")
    for time, content in enumerate(contents):
        path.write_bytes(content)
        os.utime(path, ns=(time, time))
        digests.add(digest(copy))
    assert len(digests) == 5


def test_the_fingerprint_covers_every_option_that_changes_a_vector(tmp_path):
    """Also weights in a folder below, and what the options say."""
    folder = build_checkpoint(tmp_path / "a", SHAPES["sharded"], prompts=PROMPTS)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    (folder / "below").mkdir()
    for name in set(index["weight_map"].values()):
        (folder / name).rename(folder / "below" / name)
    moved = {tensor: f"below/{name}" for tensor, name in index["weight_map"].items()}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": moved}))
    (folder / "processor_config.json").write_text("{}")
    seen = [fingerprint(folder), fingerprint(folder, max_tokens=99), fingerprint(folder)]
    assert seen[0] == seen[2] != seen[1]
    (folder / "README.md").write_text("no vector reads this")
    assert fingerprint(folder) == seen[0]
    for name in set(moved.values()):
        flip(folder / name, -1)
        seen.append(fingerprint(folder))
    for name in (
        "config.json",
        "tokenizer.json",
        "model.safetensors.index.json",
        "processor_config.json",
    ):
        path = folder / name
        path.write_text(path.read_text() + " ")
        seen.append(fingerprint(folder))
    for name, change in {
        "sentence_bert_config.json": {"max_seq_length": 50},
        "config_sentence_transformers.json": {"prompts": {"query": "q: ", "document": "d: "}},
    }.items():
        (folder / name).write_text(json.dumps(change))
        seen.append(fingerprint(folder))
    assert len(set(seen)) == len(seen) - 1
