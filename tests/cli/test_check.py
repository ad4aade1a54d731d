"""`nemoretriever check`: a local model, a server, and transformers' own classes, compared."""

from __future__ import annotations

import json
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from shared_engine import Options, Reranker, RerankOptions
from shared_engine.cli import check
from shared_engine.cli.main import main
from shared_engine.documents import EmbeddingInput
from shared_engine.local.reference import Reference
from tests.support.checkpoints import PROMPTS, SHAPES, build_checkpoint
from tests.support.oracles import numpy_float64
from tests.support.rerankers import build_reranker, build_vl_reranker
from tests.support.servers import RERANKER, running
from tests.support.vl_checkpoints import VL_SHAPES, build_vl_checkpoint


def smallest_cosine(printed: str) -> float:
    found = re.search(r"local and transformers: interchangeable: smallest cosine (\S+),", printed)
    assert found, printed
    return float(found[1])


def test_a_server_is_compared_with_the_local_model(checkpoint, tmp_path, capsys):
    other = build_checkpoint(tmp_path / "other", SHAPES["sentence-transformers"], seed=1)
    with running(Options(model=str(checkpoint), device="cpu")) as server:
        at = ["--base-url", server.url]
        assert main(["check", "--model", str(checkpoint), *at, "--dtype", "float32"]) == 0
        printed = capsys.readouterr().out
        assert "\nlocal: " in printed
        assert "\nserver: " in printed
        assert "\nlocal and server: interchangeable" in printed
        assert main(["check", "--model", str(other), *at]) == 1
        assert "\nlocal and server: not interchangeable" in capsys.readouterr().out
        assert main(["check", *at]) == 0
        assert "\nlocal: " not in capsys.readouterr().out
        assert main(["check", "--model", str(checkpoint)]) == 0
        assert "\nserver: " not in capsys.readouterr().out
    assert main(["check", "--base-url", "http://127.0.0.1:9"]) == 1


@pytest.mark.parametrize(
    ("noise", "ordered", "code", "verdict"),
    [
        (0.0, 0.9, 0, r"interchangeable: smallest cosine (1\.|0\.999)\d+, required 0\.999"),
        (0.006, 0.9, 0, r"interchangeable if the server computes in FP8: smallest cosine 0\.99\d+"),
        (0.006, 1.1, 1, r"not interchangeable: smallest cosine 0\.99\d+"),
        (1.0, 0.9, 1, r"not interchangeable: smallest cosine"),
    ],
)
def test_a_server_in_fp8_has_a_verdict_of_its_own(  # noqa: PLR0917
    noise, ordered, code, verdict, checkpoint, tmp_path, monkeypatch, capsys
):
    """Noise in the weights stands for FP8, which a CPU does not compute in."""
    monkeypatch.setattr(check, "MIN_ORDERED_FP8", ordered)
    folder = shutil.copytree(checkpoint, tmp_path / "noisy")
    torch.manual_seed(0)
    tensors = {
        name: (tensor.float() * (1 + noise * torch.randn(tensor.shape))).to(tensor.dtype)
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with running(Options(model=str(folder), device="cpu")) as server:
        at = ["--base-url", server.url, "--dtype", "float32"]
        assert main(["check", "--model", str(checkpoint), *at]) == code
    printed = capsys.readouterr().out
    assert re.search(f"\nlocal and server: {verdict}", printed), printed
    assert ("NVIDIA" in printed) == ("FP8" in verdict)
    assert re.search(r"\nlocal and server: \d+ % of the pairs of documents", printed)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_reference_agrees_with_the_engine_on_texts(shape, tmp_path, capsys):
    folder = build_checkpoint(tmp_path / "model", SHAPES[shape], prompts=PROMPTS)
    assert main(["check", "--model", str(folder), "--reference", "--dtype", "float32"]) == 0
    assert smallest_cosine(capsys.readouterr().out) >= 0.999999


@pytest.mark.parametrize("shape", VL_SHAPES)
def test_the_reference_agrees_with_the_engine_on_images(shape, tmp_path, capsys):
    folder = build_vl_checkpoint(tmp_path / "vl", VL_SHAPES[shape])
    assert main(["check", "--model", str(folder), "--reference", "--dtype", "float32"]) == 0
    printed = capsys.readouterr().out
    assert "\nimage: cosine " in printed
    assert smallest_cosine(printed) >= 0.999999


def test_the_reference_is_bidirectional_and_independent_of_the_engine(checkpoint):
    texts = ["a short text", "another, somewhat longer text of more words than the first"]
    exact = numpy_float64(checkpoint, texts, PROMPTS["document"])
    found = Reference(Options(model=checkpoint)).embed(
        [EmbeddingInput(text) for text in texts], "document"
    )
    assert np.abs(found - exact).max() <= 1e-6


def test_weights_that_the_engine_reads_in_another_way_would_be_noticed(
    checkpoint, tmp_path, capsys, monkeypatch
):
    """The comparison fails if the reference has other weights than the engine."""
    from shared_engine.local import reference

    read = reference._read_weights

    def swapped(found):
        tensors = read(found)
        first, second = "layers.0.self_attn.k_proj.weight", "layers.0.self_attn.v_proj.weight"
        tensors[first], tensors[second] = tensors[second], tensors[first]
        return tensors

    monkeypatch.setattr(reference, "_read_weights", swapped)
    assert main(["check", "--model", str(checkpoint), "--reference"]) == 1
    assert "local and transformers: not interchangeable" in capsys.readouterr().out


@pytest.mark.parametrize("build", [build_reranker, build_vl_reranker])
def test_scores_of_a_reranker_are_compared(build, tmp_path, capsys):
    folder, other = build(tmp_path / "model"), build(tmp_path / "other", seed=1)
    options = RerankOptions(model=str(folder), device="cpu", dtype="float32")
    arguments = {"rerank_options": options, "rerank_served_name": RERANKER}
    with running(None, served=None, **arguments) as server:
        at = ["--base-url", server.url, "--dtype", "float32"]
        assert main(["check", "--rerank-model", str(folder), "--reference", *at]) == 0
        printed = capsys.readouterr().out
        assert ("\nimage: largest difference of a logit" in printed) == (build is build_vl_reranker)
        for name in ("server", "transformers"):
            found = re.search(f"local and {name}: interchangeable: largest .* (\\S+),", printed)
            assert found, printed
            assert float(found[1]) < 1e-4
        assert main(["check", "--rerank-model", str(other), *at]) == 1
        assert "local and server: not interchangeable" in capsys.readouterr().out
        assert main(["check", "--rerank-model", str(folder), "--model", str(folder), *at]) == 2
        assert "check one at a time" in capsys.readouterr().err


def test_probabilities_of_a_server_are_compared(tmp_path, capsys):
    """A server of Cohere's form alone has no logits."""
    folder = build_reranker(tmp_path / "model")
    options = RerankOptions(model=str(folder), device="cpu", dtype="float32")

    class Cohere(BaseHTTPRequestHandler):
        def do_GET(self):
            self.reply({"data": [{"id": RERANKER}]})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path != "/v1/rerank":
                self.send_error(404)
                return
            with Reranker(options.replace(activation="sigmoid")) as reranker:
                ranked = reranker.rank(body["query"], body["documents"])
            rows = [{"index": i, "relevance_score": score} for i, score in ranked]
            self.reply({"results": rows})

        def reply(self, body):
            content = json.dumps(body).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Cohere) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            at = ["--base-url", f"http://127.0.0.1:{server.server_port}", "--dtype", "float32"]
            assert main(["check", "--rerank-model", str(folder), *at]) == 0
        finally:
            server.shutdown()
            thread.join()
    printed = capsys.readouterr().out
    assert "document: largest difference of a probability" in printed
    assert "local and server: interchangeable" in printed


def test_a_revision_is_that_of_a_local_model(capsys):
    assert main(["check", "--base-url", "http://127.0.0.1:9", "--revision", "none"]) == 1
    assert "\nlocal: does not work" in capsys.readouterr().out
