"""Embed tables of every format with 1 % bad rows, by all three ways, and killed again and again.

    python tests/benchmarks/dirty_data.py                          # 100,000 rows of each format
    python tests/benchmarks/dirty_data.py --rows 20000 --kills 10  # in minutes
    python tests/benchmarks/dirty_data.py --ways local --formats csv arrow

Every hundredth row is bad, in one of ten ways as far as the format allows it. The others must have
the vector that `Embedder.embed` gives and the kept values that were written, type by type; each bad
row is once in errors.parquet, with file and number. The model is tiny and random.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from shared_engine import Embedder, Options  # noqa: E402
from shared_engine.bulk.job import Job  # noqa: E402
from shared_engine.bulk.run import run_local  # noqa: E402
from tests.support.checkpoints import PROMPTS, build_checkpoint  # noqa: E402

_BAD = 100
"""Every so many rows are bad."""
_TEXTS = 997
"""Different texts; a row's text is one of them, so that the right vectors are soon computed."""
_KEPT = ("zip", "price", "when", "tags")
_PER_FILE = 4_000

_Row = dict[str, Any]


def make_row(number: int) -> _Row:
    """Return a good row; what a reader that guesses types would change is in it."""
    return {
        "key": f"k{number:07}",
        "text": make_text(number),
        "zip": f"{number % 99_999:05}",
        "price": ["1.10", "1e3", "NA", "", "true", "٣"][number % 6],
        "when": ["2024-01-01", '"quoted", twice', "two\nlines", " padded ", "é\u2028日本"][
            number % 5
        ],
        "tags": None if number % 7 == 0 else json.dumps({"n": number}),
    }


def make_text(number: int) -> str:
    """Return the text of a row."""
    return f"{number % _TEXTS} é"


@dataclass(frozen=True)
class Format:
    """A way to write a table."""

    suffix: str
    write: Callable[[Path, int], None]
    read: Callable[[_Row], tuple[Any, ...]]
    """What is kept of a row."""


def is_bad(number: int) -> bool:
    """Return whether a row is bad."""
    return number % _BAD == _BAD - 1


# Text formats


def _as_text(row: _Row) -> tuple[Any, ...]:
    return tuple(row[name] or None for name in _KEPT)


def _write_csv(path: Path, count: int, delimiter: str = ",") -> None:
    with _open(path) as file:
        file.write(delimiter.join(("key", "text", *_KEPT)).encode() + b"\n")
        for number in range(count):
            row = make_row(number)
            line = _format_csv(row, delimiter)
            file.write(
                _spoil_csv(number // _BAD % 10, row, line, delimiter) if is_bad(number) else line
            )


def _format_csv(row: _Row, delimiter: str) -> bytes:
    out = io.StringIO()
    csv.writer(out, delimiter=delimiter, lineterminator="\n").writerow(row.values())
    return out.getvalue().encode()


def _spoil_csv(kind: int, row: _Row, line: bytes, delimiter: str) -> bytes:
    """Return a line that cannot be read, or that holds no id or no text."""
    plain = {**row, "when": "x"}
    cut = delimiter.encode()
    return [
        _format_csv({**plain, "text": "@"}, delimiter).replace(b"@", b"caf\xe9"),
        _format_csv({**plain, "text": ""}, delimiter),
        _format_csv({**plain, "key": ""}, delimiter),
        _format_csv(plain, delimiter).rstrip(b"\n") + cut + b"more\n",
        cut.join([b"only", b"two"]) + b"\n",
        _format_csv({**plain, "zip": "@"}, delimiter).replace(b"@", b"\xff\xfe"),
        _format_csv({**plain, "zip": "@"}, delimiter).replace(b"@", b'"closed"early'),
        _format_csv({**plain, "text": " \t "}, delimiter),
        _format_csv({**plain, "key": "@"}, delimiter).replace(b"@", b"\xc3"),
        b'"never closed\n',
    ][kind]


def _write_json(path: Path, count: int) -> None:
    with _open(path) as file:
        for number in range(count):
            row = make_row(number)
            row["tags"] = row["tags"] and json.loads(row["tags"])
            line = json.dumps(row, ensure_ascii=number % 2 == 0).encode()
            file.write(
                (_spoil_json(number // _BAD % 10, row, line) if is_bad(number) else line) + b"\n"
            )


def _spoil_json(kind: int, row: _Row, line: bytes) -> bytes:
    return [
        line[:-9],
        json.dumps({**row, "text": "@"}).encode().replace(b"@", b"caf\xe9"),
        json.dumps({**row, "text": "\ud800"}).encode(),
        b"[1, 2]",
        b"null",
        json.dumps({**row, "key": None}).encode(),
        json.dumps({name: row[name] for name in row if name != "text"}).encode(),
        json.dumps({**row, "text": "  "}).encode(),
        line + line,
        b"[" * 100_000,
    ][kind]


def _of_json(row: _Row) -> tuple[Any, ...]:
    tags = row["tags"] and row["tags"].replace(" ", "")
    return (row["zip"], row["price"], row["when"], tags)


def _open(path: Path) -> Any:
    return gzip.open(path, "wb", 1) if path.suffix == ".gz" else path.open("wb")


# Binary formats


def _read_binary(row: _Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in _KEPT)


def _make_batches(count: int, kind: Any) -> Iterator[Any]:
    """Yield tables whose texts and ids are of a type that holds bytes that are no text."""
    size = 10_000
    for first in range(0, count, size):
        rows = [make_row(number) for number in range(first, min(first + size, count))]
        texts: list[bytes | None] = [row["text"].encode() for row in rows]
        keys: list[bytes | None] = [row["key"].encode() for row in rows]
        for at, number in enumerate(range(first, first + len(rows))):
            if is_bad(number):
                _spoil_binary(number // _BAD % 10, at, texts, keys)
        columns = {name: pa.array([row[name] for row in rows]) for name in _KEPT}
        yield pa.table({"key": _lay(keys, kind), "text": _lay(texts, kind), **columns})


def _spoil_binary(kind: int, at: int, texts: list[bytes | None], keys: list[bytes | None]) -> None:
    if kind < 6:
        texts[at] = [None, b"", b"  \n", b"caf\xe9", b"\xed\xa0\x80", b"\xf4\x90\x80\x80"][kind]
    else:
        keys[at] = [None, b"", b"\xff", b"k\xc3"][kind - 6]


def _lay(values: list[bytes | None], kind: Any) -> Any:
    plain = pa.array(values, pa.large_binary() if kind == pa.large_string() else pa.binary())
    if kind == pa.string_view():
        plain = plain.cast(pa.binary_view())
    return pa.Array.from_buffers(kind, len(plain), plain.buffers())


def _write_parquet(path: Path, count: int) -> None:
    tables = _make_batches(count, pa.string())
    first = next(tables)
    with pq.ParquetWriter(path, first.schema) as writer:
        for table in (first, *tables):
            writer.write_table(table, row_group_size=3_333)


def _write_arrow(path: Path, count: int) -> None:
    kind = pa.string_view() if path.suffix == ".feather" else pa.large_string()
    make = pa.ipc.new_file if path.suffix == ".feather" else pa.ipc.new_stream
    tables = _make_batches(count, kind)
    first = next(tables)
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with path.open("wb") as file, make(file, first.schema, options=options) as writer:
        for table in (first, *tables):
            writer.write_table(table)


FORMATS = {
    "csv": Format(".csv", _write_csv, _as_text),
    "tsv.gz": Format(".tsv.gz", lambda path, count: _write_csv(path, count, "\t"), _as_text),
    "jsonl": Format(".jsonl", _write_json, _of_json),
    "parquet": Format(".parquet", _write_parquet, _read_binary),
    "arrow": Format(".arrow", _write_arrow, _read_binary),
    "feather": Format(".feather", _write_arrow, _read_binary),
}
"""arrow is a stream of large strings, feather a file of views; both are compressed."""


# The runs


def list_command(source: Path, out: Path, model: Path, *more: str) -> list[str]:
    """Return the command of a job."""
    return [
        sys.executable, "-m", "shared_engine.cli", "embed", str(source), "--out", str(out),
        "--model", str(model), "--dtype", "float32", "--dimensions", "16", "--id-column", "key",
        "--columns", ",".join(_KEPT), "--rows-per-file", str(_PER_FILE), *more,
    ]  # fmt: skip


def embed(way: str, source: Path, out: Path, model: Path) -> int:
    """Do a job in one of three ways; return its exit code."""
    if way == "local":
        options = make_options(model)
        job = Job(
            (str(source),), str(out), options, id_column="key", columns=_KEPT,
            rows_per_file=_PER_FILE,
        )  # fmt: skip
        return int(not run_local(job, show_progress=False).is_complete)
    more = ("--ray", "--workers", "1") if way == "ray" else ()
    return subprocess.run(
        list_command(source, out, model, *more), cwd=ROOT, check=False, capture_output=True
    ).returncode


def embed_killed(source: Path, out: Path, model: Path, kills: int, dice: random.Random) -> int:
    """Do a job that is killed at random moments, over again whenever it was done before.

    Returns:
        How often it was done over again.
    """
    command = list_command(source, out, model)
    quiet = {"cwd": ROOT, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    start = time.monotonic()
    subprocess.run(command, check=False, **quiet)
    whole = time.monotonic() - start
    shutil.rmtree(out)
    hits = again = 0
    while hits < kills:
        process = subprocess.Popen(command, **quiet)
        try:
            process.wait(dice.uniform(0, whole))
            shutil.rmtree(out)
            again += 1
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            hits += 1
    subprocess.run(command, check=False, **quiet)
    return again


def make_options(model: Path) -> Options:
    """Return the options that `list_command` gives."""
    return Options(model=str(model), dtype="float32", dimensions=16)


def check(
    out: Path, format_: Format, rows: int, expected: NDArray[np.float32], name: str
) -> list[str]:
    """Return what is wrong with the results of a job."""
    table = pq.read_table(out / "vectors").sort_by("id")
    good = [number for number in range(rows) if not is_bad(number)]
    wrong = []
    if table["id"].to_pylist() != [make_row(number)["key"] for number in good]:
        return [f"{table.num_rows} ids; expected {len(good)}, each once"]
    vectors = np.stack(table["vector"].to_numpy(zero_copy_only=False))
    off = np.abs(vectors - expected[np.array(good) % _TEXTS]).max()
    if off > 1e-5:
        wrong.append(f"vectors differ by {off}")
    kept = list(zip(*(table[column].to_pylist() for column in _KEPT), strict=True))
    for number, found in zip(good, kept, strict=True):
        if found != (want := format_.read(make_row(number))):
            wrong.append(f"row {number}: kept {found}, expected {want}")
            break
    errors = pq.read_table(out / "errors.parquet").to_pylist()
    lost = sorted(row["index"] for row in errors)
    if lost != [number for number in range(rows) if is_bad(number)]:
        wrong.append(f"{len(lost)} errors; expected {rows - len(good)}, each once")
    if {row["source"] for row in errors} != {name} or not all(row["reason"] for row in errors):
        wrong.append("an error without its file or its reason")
    if left := [path.name for path in out.glob("**/.*")]:
        wrong.append(f"files are left: {left}")
    return wrong


def main() -> int:
    """Print a line for each format and way; return 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument(
        "--ways", nargs="+", default=["command", "local", "ray", "killed"],
        choices=["command", "local", "ray", "killed"],
    )  # fmt: skip
    args = parser.parse_args()
    dice = random.Random(args.seed)
    is_wrong = False
    with tempfile.TemporaryDirectory() as folder:
        model = build_checkpoint(
            Path(folder, "model"), num_hidden_layers=1, prompts=PROMPTS, matryoshka_dimensions=(16,)
        )
        with Embedder(make_options(model)) as embedder:
            expected = embedder.embed([make_text(number) for number in range(_TEXTS)])
        for kind in args.formats:
            source = Path(folder, f"in{FORMATS[kind].suffix}")
            FORMATS[kind].write(source, args.rows)
            for way in args.ways:
                out = Path(folder, "out")
                start = time.monotonic()
                note = ""
                if way == "killed":
                    again = embed_killed(source, out, model, args.kills, dice)
                    note = f", {args.kills} kills, {again} times over again"
                elif (code := embed(way, source, out, model)) != 1:
                    note = f", exit code {code}"
                wrong = check(out, FORMATS[kind], args.rows, expected, source.name)
                is_wrong |= bool(wrong) or "exit code" in note
                took = time.monotonic() - start
                print(
                    f"{kind:>8} {way:>8} {took:>7.1f} s{note}: {'; '.join(wrong) or 'right'}",
                    flush=True,
                )
                shutil.rmtree(out)
            source.unlink()
    return int(is_wrong)


if __name__ == "__main__":
    sys.exit(main())
