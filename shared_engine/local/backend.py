"""The model in this process: worker threads between a queue and its devices.

    submit ──► prepare (ahead of the devices) ──► steps (a thread each) ──► the caller's rows

To prepare is to tokenise, which the tokenizers library spreads over the cores by itself, and to
decode and cut images, for which there is a thread for each core. Queries are short and urgent: they
are tokenised by their caller and never wait behind documents.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import groupby
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from shared_engine import images
from shared_engine.backend import Request, StepStats
from shared_engine.documents import Modality
from shared_engine.errors import (
    DeviceMemoryError,
    EngineError,
    InputError,
    NeMoRetrieverError,
)
from shared_engine.local.checkpoint import resolve
from shared_engine.local.device import place
from shared_engine.local.jobs import Call, Sequence
from shared_engine.local.llama import Encoder, Means
from shared_engine.local.scheduler import TEXTS_PER_CHUNK, Scheduler
from shared_engine.local.tokenizer import TextTokenizer, TokenIds
from shared_engine.options import Options

Running: TypeAlias = tuple[list[Sequence], Means | Exception]
"""A step that was started, or could not be."""

_MOST_PREPARING = 16
_log = logging.getLogger("shared_engine")


class LocalBackend:
    """An embedding model on one device or several, shared by any number of callers."""

    def __init__(self, options: Options) -> None:
        """Find the checkpoint, download it if need be, load it, and start the workers.

        Raises:
            CheckpointError: no such checkpoint, or not one the engine computes.
            ConfigurationError: no such device.
        """
        self._checkpoint = resolve(options)
        self._vision = self._checkpoint.vision
        self._image_urls = options.image_urls
        kinds: tuple[Modality, ...] = ("text", "image", "text_image")
        self.modalities = frozenset(kinds if self._vision else kinds[:1])
        placements = place(options.device, options.dtype, options.tokens_per_step)
        self._tokenizer = TextTokenizer(self._checkpoint)
        # In a thread of its own: torch's OpenMP workers belong to the thread that first computes,
        # and a caller who forks later would wait for workers that stayed with the parent.
        with ThreadPoolExecutor(1, "nemoretriever-load") as loader:
            self._encoders = [
                loader.submit(Encoder, self._checkpoint, placement, self._tokenizer.size).result()
                for placement in placements
            ]
        self._scheduler = Scheduler(placements[0].tokens_per_step)
        self._dtype = placements[0].dtype
        self._cuts_on_device = placements[0].device.type == "cuda"
        self.dimensions = self._checkpoint.dimensions
        places = "; ".join(placement.description for placement in placements)
        self.description = f"{self._checkpoint.name} in this process on {places}"
        if self._vision:
            self.description += f", at most {self._vision.max_tiles} tiles an image"
        _log.info("%s", self.description)
        preparing = min(os.cpu_count() or 1, _MOST_PREPARING) if self._vision else 1
        work = [partial(self._compute, number) for number in range(len(placements))]
        self._workers = [
            threading.Thread(
                target=target, name=f"nemoretriever-{target.func.__name__}", daemon=True
            )
            for target in [*work, *[partial(self._prepare)] * preparing]
        ]
        for worker in self._workers:
            worker.start()

    @property
    def fingerprint(self) -> str:
        """A digest of the configuration, the tokenizer and samples of the weights."""
        tiles = self._vision and self._vision.max_tiles
        built = (self._checkpoint.prompts, str(self._dtype), tiles)
        digest = hashlib.sha256(repr(built).encode())
        for path in sorted(self._checkpoint.folder.glob("*")):
            if path.name in ("config.json", "tokenizer.json"):
                digest.update(path.read_bytes())
            elif path.suffix == ".safetensors":
                size = path.stat().st_size
                with path.open("rb") as file:
                    for block in range(64):  # all of the file would take seconds
                        file.seek(block * size // 64)
                        digest.update(file.read(4096))
        return digest.hexdigest()[:16]

    @property
    def step_stats(self) -> StepStats:
        """How many steps and tokens the device has computed."""
        scheduler = self._scheduler
        return StepStats(scheduler.steps, scheduler.tokens, scheduler.tokens_per_step)

    def submit(self, request: Request) -> Future[NDArray[np.float32]]:
        """Accept a request; see `Backend.submit`."""
        texts = [document.text or "" for document in request.documents]
        width = request.dimensions or self.dimensions[-1]
        call = Call(request, np.empty((len(texts), width), np.float32))
        if not texts:
            call.future.set_result(call.vectors)
        elif request.role == "query":
            self._scheduler.put(call, self._encoded(request, texts, list(range(len(texts)))))
        else:
            if request.truncate == "NONE":  # refuse a long text before anything is computed
                long = [
                    row
                    for row, document in enumerate(request.documents)
                    if document.image is None and not self._tokenizer.surely_fits(texts[row])
                ]
                call.known.update(zip(long, self._encoded(request, texts, long), strict=True))
            self._scheduler.put(call)
        return call.future

    def wait_until_ready(self, timeout: float) -> None:
        """Return at once: what is loaded is ready."""

    def close(self, cancel: bool = False, wait: bool = True) -> None:
        """Finish what was accepted, or cancel what has not started, then stop the workers."""
        self._scheduler.close(cancel)
        for worker in self._workers if wait else ():
            if worker is not threading.current_thread():
                worker.join()

    def _encoded(self, request: Request, texts: list[str], rows: list[int]) -> list[TokenIds]:
        out: list[TokenIds] = []
        for start in range(0, len(rows), TEXTS_PER_CHUNK):
            chunk = rows[start : start + TEXTS_PER_CHUNK]
            ids = self._tokenizer.encode([texts[row] for row in chunk], request.role)
            out += [
                self._tokenizer.cut(known, request.role, request.truncate)
                for row, known in zip(chunk, ids, strict=True)
            ]
        return out

    def _prepare(self) -> None:
        """Work of the first threads: documents to sequences, a few steps ahead of the device."""
        while (chunk := self._scheduler.next_chunk()) is not None:
            sequences: list[Sequence] = []
            for call, pairs in groupby(chunk, key=lambda pair: pair[0]):
                documents = call.request.documents
                rows = [row for _, row in pairs]
                texts = [row for row in rows if documents[row].image is None]
                try:
                    sequences += self._texts(call, texts)
                except Exception as exc:
                    _fail(call, texts, EngineError(f"the tokenizer failed: {exc}"), exc)
                for row in rows:
                    if documents[row].image is not None and not call.dropped:
                        sequences += self._image(call, row)
            self._scheduler.add(sequences)

    def _texts(self, call: Call, rows: list[int]) -> list[Sequence]:
        request = call.request
        fresh = [row for row in rows if row not in call.known]
        texts = [request.documents[row].text or "" for row in fresh]
        ids = dict(zip(fresh, self._tokenizer.encode(texts, request.role), strict=True))
        ids.update((row, call.known.pop(row)) for row in rows if row in call.known)
        cut = self._tokenizer.cut
        return [Sequence(call, row, cut(ids[row], request.role, request.truncate)) for row in rows]

    def _image(self, call: Call, row: int) -> list[Sequence]:
        """Return the sequence of an image, with its text if it has one; none where it failed."""
        assert self._vision is not None
        document, tokenizer, size = call.request.documents[row], self._tokenizer, self._vision
        try:
            prepare = images.decode_picture if self._cuts_on_device else images.cut_tiles
            tiles = prepare(document.image, size.max_tiles, size.tile_size, self._image_urls)
            ids, head = tokenizer.encode_with_image(len(tiles), document.text or "")
            ids = tokenizer.cut_with_image(ids, head, call.request.truncate)
        except InputError as exc:
            call.fail(row, exc)
            return []
        except Exception as exc:
            _fail(call, [row], EngineError(f"preparing it failed: {exc}"), exc)
            return []
        return [Sequence(call, row, ids, tiles, len(tiles) * size.patches_per_tile)]

    def _compute(self, device: int) -> None:
        """Work of a device's thread: one step after another.

        A GPU is given a step while it computes the one before, and so never waits for this thread.
        """
        if (gpu := self._encoders[device].device).type == "cuda":
            torch.cuda.set_device(gpu)  # else pinned memory would wake the first GPU, too
        running: deque[Running] = deque()
        while True:
            step = self._scheduler.take_step() if running else self._scheduler.next_step()
            if step is None:
                return
            encoder = self._encoders[device]
            running += self._start(step, encoder)
            while running and not (step and encoder.runs_ahead and len(running) == 1):
                _collect(*running.popleft())

    def _start(self, step: list[Sequence], encoder: Encoder) -> list[Running]:
        """Start a step; where memory runs out, its halves."""
        if not step:
            return []
        try:
            ids, tiles = [each.ids for each in step], [each.tiles for each in step]
            return [(step, encoder(ids, tiles))]
        except Exception as exc:
            error = exc.with_traceback(None)  # the traceback would keep the step's tensors alive
        if not _is_out_of_memory(error) or len(step) == 1:
            return [(step, error)]
        tokens = sum(sequence.cost for sequence in step)
        self._scheduler.tokens_per_step = max(1, tokens // 2)
        _log.warning("out of memory at %d tokens a step; going on with half", tokens)
        if encoder.device.type == "cuda":
            torch.cuda.empty_cache()
        half = len(step) // 2
        return [*self._start(step[:half], encoder), *self._start(step[half:], encoder)]


def _collect(step: list[Sequence], means: Means | Exception) -> None:
    """Wait for a step and deliver its rows, or what went wrong."""
    error = None
    try:
        if isinstance(means, Exception):
            raise means
        vectors = means.array()  # (S, hidden)
    except Exception as exc:
        error = exc.with_traceback(None)
    start = 0
    for call, group in groupby(step, key=lambda sequence: sequence.call):
        members = list(group)
        rows = [sequence.row for sequence in members]
        tokens = sum(len(sequence.ids) for sequence in members)
        if error is None:
            call.deliver(rows, vectors[start : start + len(rows)], tokens)
        elif _is_out_of_memory(error):
            message = f"does not fit in the device's memory ({tokens} tokens)"
            _fail(call, rows, DeviceMemoryError(message), error)
        else:
            _fail(call, rows, EngineError(f"the forward pass failed: {error}"), error)
        start += len(rows)


def _fail(call: Call, rows: list[int], error: NeMoRetrieverError, cause: Exception) -> None:
    error.__cause__ = cause
    for row in rows:
        call.fail(row, error)


def _is_out_of_memory(error: Exception) -> bool:
    # A CPU's allocator raises a plain RuntimeError.
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )
