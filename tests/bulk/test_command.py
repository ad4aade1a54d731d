"""`nemoretriever embed` and its plan."""

from __future__ import annotations

import asyncio
import json
import time

import httpx
import pyarrow.parquet as pq
import pytest

from shared_engine import Embedder, Options
from shared_engine.bulk.job import Job
from shared_engine.bulk.plan import plan
from shared_engine.bulk.run import Summary, find_work, run_local
from shared_engine.cli.main import main
from tests.bulk.conftest import passages
from tests.support import pdfs
from tests.support.nim import Nim


@pytest.fixture
def command(tmp_path, checkpoint):
    path = tmp_path / "in.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"passage {n}"}) for n in range(40)))
    return ["embed", str(path), "--out", str(tmp_path / "out"), "--model", str(checkpoint)]


def test_the_last_line_and_the_status_say_what_was_done(command, tmp_path, capsys):
    assert main(command) == 0
    said = capsys.readouterr()
    assert said.out.splitlines()[-1].startswith("40 rows done, 0 failed, 0 skipped")
    assert "40 of 40 rows to embed" in said.err
    assert main(command) == 0
    assert "0 rows done, 0 failed, 40 skipped" in capsys.readouterr().out
    with Embedder(Options(model=command[-1])) as embedder:
        expected = embedder.embed([f"passage {n}" for n in range(40)])
    table = pq.read_table(tmp_path / "out" / "vectors")
    assert abs(expected - table["vector"].to_pylist()).max() < 1e-6


def test_a_text_that_is_too_long_is_a_bad_row(command, tmp_path, capsys):
    (tmp_path / "in.jsonl").write_text(
        '{"text": "short"}\n' + json.dumps({"text": "long " * 500}) + '\n{"text": null}\n'
    )
    assert main([*command, "--max-tokens", "64"]) == 1
    said = capsys.readouterr()
    assert "1 rows done, 2 failed" in said.out
    assert "errors.parquet" in said.err
    errors = pq.read_table(tmp_path / "out" / "errors.parquet").to_pylist()
    assert [(row["kind"], row["index"]) for row in errors] == [
        ("InputTooLongError", 1),
        ("InputError", 2),
    ]


def test_a_page_that_never_ends_is_a_bad_row(command, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    good = pdfs.Leaf("BT /F1 12 Tf 20 150 Td (good) Tj ET")
    (folder / "a.pdf").write_bytes(pdfs.write(good, pdfs.ENDLESS, good))
    (folder / "b.pdf").write_bytes(pdfs.write(good))
    pdfs.limit_pages(monkeypatch, seconds=0.5)
    assert main([command[0], str(folder), *command[2:], "--pdf", "text"]) == 1
    assert "3 rows done, 1 failed" in capsys.readouterr().out
    (error,) = pq.read_table(tmp_path / "out" / "errors.parquet").to_pylist()
    assert (error["id"], error["kind"]) == ("a.pdf#page=2", "InputError")
    assert error["reason"].startswith("a.pdf, page 2, took more than 0.5 s of processor time")
    done = pq.read_table(tmp_path / "out" / "vectors", columns=["id"])["id"].to_pylist()
    assert sorted(done) == ["a.pdf#page=1", "a.pdf#page=3", "b.pdf#page=1"]


def test_other_options_make_no_sense_in_the_same_folder(command, capsys):
    assert main(command) == 0
    assert main([*command, "--dimensions", "16"]) == 2
    assert "was begun with dimensions None" in capsys.readouterr().err
    assert main(["embed", "/no/such", "--out", "/tmp/none"]) == 2
    assert "/no/such does not exist" in capsys.readouterr().err


def test_a_plan_writes_nothing_and_tells_every_choice(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("shared_engine.cli.embed._PLAN_SECONDS", 0.5)
    (tmp_path / "in.jsonl").write_text(
        "\n".join(json.dumps({"text": f"passage {n}"}) for n in range(2000))
    )
    assert main([*command, "--plan"]) == 0
    said = capsys.readouterr().out
    assert "2,000 of 2,000 rows to embed, about" in said
    assert "rows/s" in said
    assert "int8 (GB)" in said
    assert not (tmp_path / "out").exists()


def test_the_share_of_a_worker_is_given_to_the_cluster(command, monkeypatch):
    given = []

    def run_ray(job, address, **share):
        given.append((address, share))
        return Summary(0, 0, 0, 0, 0.0)

    monkeypatch.setattr("shared_engine.distributed.bulk.run_ray", run_ray)
    share = ["--workers", "3", "--cpus-per-worker", "2", "--gpus-per-worker", "0.5"]
    assert main([*command, "--ray", *share]) == 0
    assert main([*command, "--ray", "auto", *share]) == 0
    assert main([*command, "--workers", "3"]) == 0
    asked = {"workers": 3, "cpus_per_worker": 2.0, "gpus_per_worker": 0.5}
    assert given == [(None, asked), ("auto", asked), (None, {"workers": 3})]


def test_a_plan_leaves_out_what_it_cannot_read_and_names_it(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("shared_engine.cli.embed._PLAN_SECONDS", 0.2)
    (tmp_path / "in").mkdir()
    (tmp_path / "in.jsonl").rename(tmp_path / "in" / "good.jsonl")
    (tmp_path / "in" / "bad.jsonl").write_text("no JSON\n")
    with (tmp_path / "in" / "good.jsonl").open("ab") as file:
        file.write(b'\n{"text": "caf\xe9"}\n{"text": ')
    assert main(["embed", str(tmp_path / "in"), *command[2:], "--plan"]) == 0
    said = capsys.readouterr().out
    assert "42 of 42 rows to embed" in said
    assert "without 1 files that cannot be read:" in said
    assert "bad.jsonl cannot be read: expected JSON Lines" in said
    assert not (tmp_path / "out").exists()


def test_the_sample_is_from_all_over(tmp_path, nim):
    """A file of short texts and one of long ones: a plan from the first alone would be far off."""
    for name, words in (("a", 2), ("b", 30)):
        lines = [json.dumps({"text": "word " * words}) for _ in range(3000)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    embedder = nim.embedder()
    job = Job((str(tmp_path),), str(tmp_path / "out"), embedder.options, rows_per_file=100)
    told = plan(job, embedder, find_work(job), seconds=1.0)
    assert told.tokens_per_row == pytest.approx(16, rel=0.25)
    assert told.rows == told.missing == 6000


@pytest.mark.slow
def test_a_plan_is_within_a_quarter_of_the_run(tmp_path):
    pq.write_table(passages(20_000), tmp_path / "in.parquet")
    nim = Nim()

    async def answer(request: httpx.Request) -> httpx.Response:
        await asyncio.sleep(0.05)
        return nim(request)

    options = Options(
        base_url="http://nim:8000",
        http_client_factory=lambda: httpx.AsyncClient(transport=httpx.MockTransport(answer)),
        concurrency=2,
    )
    with Embedder(options) as embedder:
        job = Job((str(tmp_path / "in.parquet"),), str(tmp_path / "out"), options)
        told = plan(job, embedder, find_work(job), seconds=4.0)
        start = time.monotonic()
        summary = run_local(job, embedder, show_progress=False)
        took = time.monotonic() - start
    assert told.seconds == pytest.approx(took, rel=0.25)
    assert told.rows * told.tokens_per_row == pytest.approx(summary.tokens, rel=0.05)
    size = sum(path.stat().st_size for path in (tmp_path / "out" / "vectors").iterdir())
    assert told.count_bytes(16, 32) == pytest.approx(size, rel=0.25)
