"""Recorded replies of NIMs, each with its source: `replies/*.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

import shared_engine
from shared_engine.nim.protocol import build_error, list_models, parse_reply, read_error

REPLIES = {
    path.stem: json.loads(path.read_text(encoding="utf-8"))
    for path in sorted((Path(__file__).parent / "replies").glob("*.json"))
}


def respond(recorded: dict[str, Any]) -> httpx.Response:
    content = recorded["text"] if "text" in recorded else json.dumps(recorded["body"])
    return httpx.Response(recorded["status"], text=content, headers=recorded.get("headers"))


@pytest.mark.parametrize("name", REPLIES)
def test_a_recorded_reply_is_understood(name: str) -> None:
    recorded = REPLIES[name]
    assert recorded["source"]
    response, expected = respond(recorded), recorded["expected"]
    if "error" in expected:
        reply = read_error(response)
        error = build_error(reply)
        assert type(error) is getattr(shared_engine, expected["error"])
        assert expected["words"] in str(error)
        assert reply.field == expected.get("field")
        for attribute in expected.keys() & {"tokens", "limit"}:
            assert getattr(error, attribute) == expected[attribute]
    elif "models" in expected:
        assert list_models(response) == expected["models"]
    else:
        vectors, tokens, _ = parse_reply(response.content, len(expected["vectors"]))
        assert (vectors.tolist(), tokens) == (expected["vectors"], expected["tokens"])
