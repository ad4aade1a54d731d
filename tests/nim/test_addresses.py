"""`base_url`: one address, normalized, or a clear error."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from langchain_nemoretriever import NeMoRetrieverEmbeddings
from llamaindex_nemoretriever import NeMoRetrieverEmbedding
from shared_engine import ConfigurationError, Options
from shared_engine.routing import select_backend

KEY = "nvapi-this-is-secret"


@pytest.mark.parametrize("kind", [Options, NeMoRetrieverEmbeddings, NeMoRetrieverEmbedding])
@pytest.mark.parametrize("name", ["base_url", "nvidia_base_url"])
@pytest.mark.parametrize(
    "several",
    [
        "http://nim-a:8000,http://nim-b:8000",
        f"http://nim-a,http://user:{KEY}@nim-b",
        "http://nim-a,",
        ["http://nim-a:8000", "http://nim-b:8000"],
        ("http://nim-a:8000",),
        [],
    ],
)
def test_several_addresses_are_refused_with_what_to_do_instead(
    kind: type[Options], name: str, several: Any
) -> None:
    with pytest.raises(
        ConfigurationError, match=r"base_url= .*one address.*load balancer"
    ) as caught:
        kind(**{name: several})
    assert KEY not in f"{caught.value}{caught.value.__context__}{caught.value.__cause__}"


def test_the_environment_names_one_address_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVIDIA_BASE_URL", "http://nim-a,http://nim-b")
    with pytest.raises(ConfigurationError, match=r"NVIDIA_BASE_URL has a comma"):
        select_backend(Options())
    monkeypatch.setenv("NVIDIA_BASE_URL", "ftp://nim")
    with pytest.raises(ConfigurationError, match=r"NVIDIA_BASE_URL .*is not an http"):
        select_backend(Options())


@pytest.mark.parametrize("wrong", [1, b"http://nim", {"a": "b"}])
def test_an_address_is_a_text(wrong: Any) -> None:
    with pytest.raises(ConfigurationError, match="expected one address"):
        Options(base_url=wrong)


def test_a_normalized_address_stays_as_it_is() -> None:
    options = Options(base_url="http://nim:8000/")
    for copy in (pickle.loads(pickle.dumps(options)), options.replace(timeout=1.0)):
        assert copy.base_url == select_backend(copy).base_url == "http://nim:8000/v1"


@pytest.mark.parametrize(
    "url",
    [
        "http://nim:8000/v1/completions",
        "https://nim/embeddings",
        "https://ai.api.nvidia.com/v1/retrieval/nvidia/x",
        "https://user:hunter2@nim/v1",
        "https://nim/v1?key=hunter2",
        "https://nim/v1#hunter2",
        "https://nim/nvapi-hunter2/v1",
        "https://nvapi-hunter2/v1",
        "https://nvapi-hunter2.nim/v1?key=nvapi-hunter2",
        "nim:8000",
        "ftp://nim",
        "http://",
        "http://nim:port/v1",
        "",
    ],
)
def test_an_invalid_address_is_refused_with_an_example(url: str) -> None:
    with pytest.raises(ValueError, match="localhost:8000/v1") as caught:
        Options(base_url=url)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://nim:8000", "http://nim:8000/v1"),
        ("http://nim:8000/", "http://nim:8000/v1"),
        (" http://nim:8000/v1/ ", "http://nim:8000/v1"),
        ("https://gateway/team", "https://gateway/team/v1"),
        ("http://[::1]:8000", "http://[::1]:8000/v1"),
    ],
)
def test_the_root_and_v1_are_one_address(url: str, expected: str) -> None:
    assert Options(base_url=url).base_url == expected
    assert Options(nvidia_base_url=url).base_url == expected


@pytest.mark.parametrize("end", ["", "/"])
@pytest.mark.parametrize("path", ["embeddings", "ranking", "rerank"])
def test_the_path_of_a_request_is_removed_with_a_warning(path: str, end: str) -> None:
    for name in ("base_url", "nvidia_base_url"):
        with pytest.warns(UserWarning, match=f"ends in /{path}, which"):
            options = Options(**{name: f"http://nim:8000/v1/{path}{end}"})
        assert options.base_url == "http://nim:8000/v1"
        assert options.replace(timeout=1.0).base_url == "http://nim:8000/v1"


@pytest.mark.parametrize("value", ["false", "False", "0", "no"])
def test_nvidias_variable_leaves_v1_out(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVIDIA_APPEND_API_VERSION", value)
    assert Options(base_url="https://gateway/embed/").base_url == "https://gateway/embed"
    assert Options(base_url="https://gateway/").base_url == "https://gateway"
    monkeypatch.setenv("NVIDIA_APPEND_API_VERSION", "true")
    assert Options(base_url="https://gateway/embed/").base_url == "https://gateway/embed/v1"
