"""The choice of a backend: options take precedence over the environment."""

from __future__ import annotations

import itertools
import logging

import numpy as np
import pytest
from pydantic import BaseModel, ValidationError

from shared_engine import ConfigurationError, Embedder, Options
from shared_engine.endpoints import HOSTED
from shared_engine.registry import Engine
from shared_engine.routing import Choice, select_backend

ELSEWHERE = "http://127.0.0.1:9/v1"
"""An address without a server."""

OTHER = {  # than the default
    "model": "nvidia/other",
    "checkpoint": "/folder",
    "revision": "main",
    "device": "cpu",
    "dtype": "float32",
    "dimensions": 384,
    "embedding_type": "int8",
    "truncate": "END",
    "max_tokens": 7,
    "max_tiles": 3,
    "allow_image_urls": True,
    "max_batch_tokens": 99,
    "show_progress": True,
    "backend": "local",
    "base_url": "http://nim/v1",
    "api_key": "nvapi-other",
    "allow_insecure_key": True,
    "default_headers": {"x-team": "search"},
    "timeout": 3.0,
    "deadline": 9.0,
    "max_retries": 1,
    "max_batch_size": 2,
    "concurrency": 3,
    "max_image_characters": 50_000,
    "verify_ssl": False,
    "proxy": "http://proxy:3128",
    "user": "me",
    "prefixes": {"query": "q: ", "document": "d: "},
    "http_client_factory": dict,
}
LOCAL = Options.names_of("local")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NVIDIA_API_KEY", raising=False)
    monkeypatch.setenv("NVIDIA_BASE_URL", ELSEWHERE)


def test_an_address_in_the_environment_is_the_default():
    chosen = select_backend(Options())
    assert (chosen.base_url, chosen.reason) == (ELSEWHERE, "NVIDIA_BASE_URL is set")
    assert select_backend(Options(base_url="http://nim")).base_url == "http://nim/v1"
    assert select_backend(Options(api_key="nvapi-1")).base_url == ELSEWHERE
    assert select_backend(Options(backend="nim")).base_url == ELSEWHERE


def test_an_embedder_names_the_address_that_it_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Embedder(Options()).base_url == ELSEWHERE
    assert Embedder(Options(backend="local")).base_url is None
    monkeypatch.delenv("NVIDIA_BASE_URL")
    assert Embedder(Options()).base_url is None
    assert Embedder(Options(api_key="nvapi-1")).base_url == HOSTED


@pytest.mark.parametrize("name", LOCAL)
def test_an_option_for_this_process_is_never_overridden_by_the_environment(name):
    chosen = select_backend(Options(**{name: OTHER[name]}))
    assert chosen.base_url is None
    assert f"{name}= is given" in chosen.reason
    assert "NVIDIA_BASE_URL" in chosen.reason


@pytest.mark.parametrize("model", ["/models/mine", "./mine", "../mine", "~/mine"])
def test_a_folder_is_for_this_process_too(model):
    assert select_backend(Options(model=model)).base_url is None
    assert select_backend(Options(model=model, base_url=ELSEWHERE)).base_url == ELSEWHERE


@pytest.mark.parametrize("name", LOCAL)
@pytest.mark.parametrize(
    "there",
    [{"base_url": "http://nim"}, {"api_key": "nvapi-1"}, {"backend": "nim"}],
    ids=lambda there: next(iter(there)),
)
def test_contradicting_options_are_an_error_that_names_both(name, there):
    with pytest.raises(ConfigurationError, match=f"{name}=") as caught:
        select_backend(Options(**{name: OTHER[name]}, **there))
    assert next(iter(there)) in str(caught.value) or "NVIDIA_BASE_URL" in str(caught.value)


def test_local_and_an_address_contradict_each_other():
    with pytest.raises(ConfigurationError, match=r'base_url= .* backend="local"'):
        select_backend(Options(backend="local", base_url="http://nim"))
    assert select_backend(Options(backend="local", api_key="nvapi-1")).base_url is None


def test_a_nim_without_an_address_is_the_catalogue(monkeypatch):
    monkeypatch.delenv("NVIDIA_BASE_URL")
    with pytest.raises(ConfigurationError, match="needs a key"):
        select_backend(Options(backend="nim"))
    monkeypatch.setenv("NVIDIA_API_KEY", "nvapi-1")
    assert select_backend(Options(backend="nim")).base_url == HOSTED
    assert select_backend(Options()).base_url is None, "a key alone sends nothing anywhere"


@pytest.mark.parametrize("given", [{"backend": "local"}, {"device": "cpu"}, {"dtype": "float32"}])
def test_nothing_leaves_the_process(checkpoint, given):
    with Embedder(Options(model=str(checkpoint), **given)) as embedder:
        assert embedder.embed(["here"]).shape == (1, 64)
        assert "in this process on cpu" in embedder.description


def test_a_missing_checkpoint_explains_the_key_of_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("NVIDIA_API_KEY", "nvapi-secret")
    with pytest.raises(ConfigurationError, match=r'NVIDIA_API_KEY .* backend="nim"') as caught:
        Embedder(Options(model=str(tmp_path))).embed(["x"])
    assert "secret" not in str(caught.value)


def test_a_key_of_the_environment_that_selects_nothing_is_a_warning(monkeypatch):
    monkeypatch.delenv("NVIDIA_BASE_URL")
    assert select_backend(Options()).level == logging.INFO
    monkeypatch.setenv("NVIDIA_API_KEY", "nvapi-secret")
    chosen = select_backend(Options())
    assert (chosen.base_url, chosen.level) == (None, logging.WARNING)
    assert 'backend="nim"' in chosen.reason
    assert "secret" not in chosen.reason
    for given in ({"backend": "local"}, {"device": "cpu"}, {"model": "/folder"}):
        assert select_backend(Options(**given)).level == logging.INFO


# Sharing


def engine_key(options: Options, scope: str) -> tuple[object, ...]:
    address = None if scope == "local" else ELSEWHERE
    return Engine(options, Choice(address, None, "")).key


@pytest.mark.parametrize("name", Options.model_fields)
def test_engines_are_shared_unless_an_option_of_theirs_differs(name):
    """Covers each new option, which needs a scope and a value in OTHER."""
    scope = next(s for s in ("routing", "engine", "local", "nim", "request")
                 if name in Options.names_of(s))  # fmt: skip
    other = Options(model="nvidia/one", **{name: OTHER[name]}) if name != "model" else Options(
        model=OTHER["model"])  # fmt: skip
    for where in ("local", "nim"):
        shared = engine_key(Options(model="nvidia/one"), where) == engine_key(other, where)
        assert shared == (scope not in ("engine", where)), where


def test_an_option_needs_a_scope():
    from shared_engine import options

    with pytest.raises(TypeError, match="scope"):
        options._option(default=None)
    assert all(
        sum(name in Options.names_of(scope) for scope in ("routing", "engine", "local", "nim",
                                                          "request")) == 1
        for name in Options.model_fields
    )  # fmt: skip


# The same engine with other options


def test_a_sibling_shares_the_engine_and_counts_for_itself(checkpoint):
    with Embedder(Options(model=str(checkpoint), backend="local", max_tokens=99)) as embedder:
        full = embedder.embed(["one", "two"])
        used = embedder.usage
        short = embedder.with_options(dimensions=16)
        assert short.load() is embedder.load()
        cut = full[:, :16] / np.linalg.norm(full[:, :16], axis=1, keepdims=True)
        assert np.abs(short.embed(["one", "two"]) - cut).max() <= 1e-6
        assert (short.usage, embedder.usage) == (used, used)
        short.close()
        assert embedder.embed(["three"]).shape == (1, 64)
        with pytest.raises(ConfigurationError, match="max_tokens: would need another engine"):
            embedder.with_options(max_tokens=5)
        with pytest.raises(ValidationError):
            embedder.with_options(dimensions=-5)
        with pytest.raises(ValidationError):
            embedder.with_options(nothing=1)


def test_every_combination_has_a_reason(monkeypatch):
    """Any options lead to one decision with a reason, or to an error of ours."""
    monkeypatch.setenv("NVIDIA_API_KEY", "nvapi-1")
    offers = [
        ("backend", ["auto", "local", "nim"]),
        ("base_url", [None, "http://nim"]),
        ("api_key", [None, "nvapi-2"]),
        ("device", ["auto", "cpu"]),
        ("model", ["nvidia/m", "/folder"]),
    ]
    for values in itertools.product(*(values for _, values in offers)):
        given = dict(zip((name for name, _ in offers), values, strict=True))
        options: BaseModel = Options(**given)
        try:
            chosen = select_backend(options)
        except ConfigurationError:
            assert given["backend"] != "auto" or given["device"] != "auto", given
            continue
        assert chosen.reason
        if given["backend"] != "auto":
            assert (chosen.base_url is None) == (given["backend"] == "local")
