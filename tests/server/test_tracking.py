"""Request ids and log lines, over real sockets."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shared_engine import ConfigurationError, Options, RerankOptions
from shared_engine.cli.main import main
from shared_engine.logs import log_to_stderr
from shared_engine.server.admission import Admission
from tests.support.checkpoints import SHAPES, build_checkpoint
from tests.support.servers import NAME, TEXTS, Running, running

KEY = "nvapi-this-is-secret"
OWN = re.compile(r"[0-9a-f]{32}")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = build_checkpoint(tmp_path_factory.mktemp("tiny"), SHAPES["sentence-transformers"])
    options = Options(model=str(folder), device="cpu", dtype="float32")
    with running(options, access_log=True) as here:
        yield here


def read_entries(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("path", ["/embeddings", "/nowhere", "/health/live", "/models/none"])
def test_every_answer_has_the_id_of_its_request(served: Running, path: str) -> None:
    ids = [served.client.get(path).headers["x-request-id"] for _ in range(2)]
    assert all(map(OWN.fullmatch, ids))
    assert len(set(ids)) == 2
    assert served.client.get(path, headers={"x-request-id": "a/b:1"}).headers["x-request-id"] == (
        "a/b:1"
    )


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, "é".encode(), b"a\tb"])
def test_another_id_replaces_an_invalid_one(served: Running, given: str | bytes) -> None:
    got = served.client.get("/version", headers={"x-request-id": given})  # type: ignore[dict-item]
    assert OWN.fullmatch(got.headers["x-request-id"])


def test_a_refusal_by_the_key_has_an_id(served: Running) -> None:
    with running(served.options, api_key="k") as here:
        refused = here.post()
        assert refused.status_code == 401
        assert OWN.fullmatch(refused.headers["x-request-id"])


def test_the_access_log_has_counts_and_no_probes(served: Running, capsys) -> None:
    with log_to_stderr("info", "json"):
        tokens = served.post().json()["usage"]["total_tokens"]
        served.post(input=[])
        for path in ("/health/live", "/health/ready", "/metrics"):
            served.client.get(path)
        served.client.get("../health")
    done, refused = read_entries(capsys.readouterr().err)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", done["time"])
    assert (done["level"], done["logger"]) == ("info", "shared_engine.access")
    assert (done["client"], done["method"], done["path"]) == ("127.0.0.1", "POST", "/v1/embeddings")
    assert (done["status"], done["inputs"], done["tokens"]) == (200, len(TEXTS), tokens)
    assert 0 < done["seconds"] < 30
    assert OWN.fullmatch(done["request_id"])
    assert refused["status"] == 400
    assert "tokens" not in refused


def test_text_lines_have_the_time_and_the_request(served: Running, capsys) -> None:
    with log_to_stderr("debug", "text"):
        served.client.get("/health/live", headers={"x-request-id": "abc"})
        served.post(input="a")
        served.post(input=["a", "b"])
    probe, one, two = capsys.readouterr().err.splitlines()
    assert re.fullmatch(
        r"\S+T\S+Z DEBUG: 127.0.0.1 GET /v1/health/live 200 in 0.\d+ s \[request abc\]", probe
    )
    assert re.search(r" s, 1 input, \d+ tokens \[", one)
    assert re.search(r" s, 2 inputs, \d+ tokens \[", two)


def test_no_key_of_an_address_is_logged(served: Running, capsys) -> None:
    with log_to_stderr("debug", "text"):
        served.client.post(f"/embeddings?api_key={KEY}&key=hidden", json={})
        served.client.get(f"/models/{KEY}?key=hidden")
        served.client.get("/nowhere%0AINFO: forged")
    printed = capsys.readouterr().err
    assert printed.count("\n") == 3
    assert "/v1/models/nvapi-***" in printed
    assert "secret" not in printed
    assert "hidden" not in printed


def test_a_failure_is_found_in_the_log_by_its_id(
    served: Running, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Admission) -> None:
        raise LookupError("a bug")

    monkeypatch.setattr(Admission, "require_space", fail)
    with log_to_stderr("info", "json"):
        got = served.post()
    failure, access = read_entries(capsys.readouterr().err)
    found = got.headers["x-request-id"]
    assert found in got.json()["error"]["message"]
    assert failure["request_id"] == access["request_id"] == found
    assert "LookupError: a bug" in failure["exception"]
    assert access["status"] == 500


def test_a_program_keeps_its_own_logging() -> None:
    logs = [logging.getLogger(name) for name in ("shared_engine", "uvicorn")]
    before = [(log.level, list(log.handlers)) for log in logs]
    with log_to_stderr("debug", "text"):
        pass
    assert [(log.level, list(log.handlers)) for log in logs] == before


@pytest.mark.parametrize("kind", [Options, RerankOptions])
@pytest.mark.parametrize("name", ["model", "checkpoint", "revision", "base_url", "device", "user"])
def test_a_key_in_another_option_is_refused(kind: type[Options], name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{name}= is an API key; pass it as") as caught:
        kind(**{name: KEY})
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "arguments",
    [
        ["serve", KEY],
        ["serve", "--rerank-model", KEY],
        ["serve", "--port", KEY],
        ["serve", KEY, "--model", KEY],
        ["serve", "--allowed-host", f"{KEY}*", "--port", "0"],
        ["embed", "in.csv", "--out", "o", "--base-url", KEY],
        ["embed", KEY, "--out", "o", "--device", "cpu"],
        ["embed", "in.csv", "--out", "o", "--api-key-env", KEY.replace("nvapi", "k")],
        ["check", "--model", KEY],
        ["evaluate", KEY, "--device", "cpu"],
    ],
)
def test_no_error_shows_a_key(
    arguments: list[str], capsys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        code = main(arguments)
    except SystemExit as ended:
        code = ended.code  # type: ignore[assignment]
    assert code
    printed = capsys.readouterr()
    assert printed.err
    assert "secret" not in printed.out + printed.err


@pytest.mark.parametrize("option", ["--replicas", "--cpus-per-replica", "--ray"])
def test_replicas_refuse_an_access_log(option, capsys) -> None:
    assert main(["serve", NAME, option, "2", "--access-log"]) == 2
    assert "remove it" in capsys.readouterr().err


def test_no_replicas_are_refused(capsys) -> None:
    assert main(["serve", NAME, "--replicas", "0"]) == 2
    assert "--replicas: must be greater than 0" in capsys.readouterr().err
