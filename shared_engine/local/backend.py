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
from collections.abc import Callable
from concurrent.futures import Future
from functools import cached_property, partial
from itertools import groupby
from typing import TypeAlias
from weakref import WeakSet

import numpy as np
import torch

from shared_engine import images
from shared_engine.backend import Backend, Request, Rows, StepStats
from shared_engine.documents import Modality
from shared_engine.errors import (
    DeviceMemoryError,
    EngineError,
    InputError,
    InputTooLongError,
    NeMoRetrieverError,
    first_line,
)
from shared_engine.local.checkpoint import resolve
from shared_engine.local.device import Placement, make_current, select_devices
from shared_engine.local.device_errors import is_fatal, is_out_of_memory
from shared_engine.local.fingerprint import digest_files, list_files
from shared_engine.local.jobs import Job, TokenSequence
from shared_engine.local.llama import Encoder, PooledOutput
from shared_engine.local.memory import pin_image, release_gpu_memory
from shared_engine.local.scheduler import Scheduler
from shared_engine.local.tokenizer import TextTokenizer
from shared_engine.options import Options
from shared_engine.threads import run_in_own_thread

Running: TypeAlias = tuple[list[TokenSequence], PooledOutput | Exception]
"""A step that was started, or could not be."""

_MOST_PREPARING = 16
_gpu_users: WeakSet[LocalBackend] = WeakSet()
"""The backends of this process that use a GPU, from the start of their loading to their end."""
_log = logging.getLogger("shared_engine")


class LocalBackend(Backend):
    """An embedding model on one device or several, shared by any number of callers."""

    modalities: frozenset[Modality] = frozenset()
    dimensions: tuple[int, ...] = ()
    description = ""
    failure: Exception | None = None

    def __init__(self, options: Options, load: Callable[..., Encoder] = Encoder) -> None:
        """Find the checkpoint, download it if need be, load it, and start the workers.

        `load` makes the encoder of a device, called as `Encoder` is.

        Raises:
            CheckpointError: no such checkpoint, or not one the engine computes.
            ConfigurationError: no such device.
        """
        self._checkpoint = resolve(options)
        self._files = list_files(self._checkpoint.folder)
        self._vision = self._checkpoint.vision
        self._image_urls = options.allow_image_urls
        kinds: tuple[Modality, ...] = ("text", "image", "text_image")
        self.modalities = frozenset(kinds if self._vision else kinds[:1])
        self._tokenizer = TextTokenizer(self._checkpoint)
        # In a thread of its own: torch's OpenMP workers belong to the thread that first computes,
        # and a caller who forks later would wait for workers that stayed with the parent.
        placements, self._encoders = run_in_own_thread(self._load, options, load)
        self._scheduler = Scheduler(placements[0].max_batch_tokens)
        self._dtype = placements[0].dtype
        self._cuts_on_device = placements[0].device.type == "cuda"
        self.dimensions = self._checkpoint.dimensions
        places = "; ".join(encoder.description for encoder in self._encoders.values())
        self.description = f"{self._checkpoint.name} in this process on {places}"
        if self._vision:
            self.description += f", at most {self._vision.max_tiles} tiles per image"
        _log.info("%s", self.description)
        preparing = min(os.cpu_count() or 1, _MOST_PREPARING) if self._vision else 1
        work: dict[str, Callable[[], None]] = {
            f"nemoretriever-compute-{n}": partial(self._compute, n) for n in range(len(placements))
        }
        work |= {f"nemoretriever-prepare-{n}": self._prepare for n in range(preparing)}
        self._workers = [
            threading.Thread(target=target, name=name, daemon=True) for name, target in work.items()
        ]
        for worker in self._workers:
            worker.start()

    def _load(
        self, options: Options, load: Callable[..., Encoder]
    ) -> tuple[list[Placement], dict[int, Encoder]]:
        _gpu_users.add(self)
        placements = select_devices(
            options.device, options.dtype, options.max_batch_tokens, self._checkpoint.config
        )
        if all(placement.device.type != "cuda" for placement in placements):
            _gpu_users.discard(self)
        encoders = {}
        for number, placement in enumerate(placements):
            with make_current(placement.device):
                encoders[number] = load(self._checkpoint, placement, self._tokenizer.size)
        return placements, encoders

    @cached_property
    def fingerprint(self) -> str:
        """A digest of every byte of the checkpoint, and of what the options make of it.

        The first call reads all weights, at about 1 GB per second and core.

        Raises:
            CheckpointError: the files were changed after they were loaded, before this call.
        """
        found = self._checkpoint
        tiles = found.vision and found.vision.max_tiles
        limits = (found.max_tokens, found.max_tokens_with_image)
        files = digest_files(found.folder, self._files)
        built = (found.prompts, str(self._dtype), tiles, limits, files)
        return hashlib.sha256(repr(built).encode()).hexdigest()[:16]

    @property
    def step_stats(self) -> StepStats:
        """How many steps and tokens the devices have computed."""
        scheduler = self._scheduler
        return StepStats(scheduler.steps, scheduler.tokens, scheduler.max_batch_tokens)

    def submit(self, request: Request) -> Future[Rows]:
        """Accept a request; see `Backend.submit`."""
        if self.failure is not None:
            raise EngineError(
                f"the device failed ({first_line(self.failure)}), and this process "
                "cannot use it any more; restart it"
            ) from self.failure
        rows = list(range(len(request.documents)))
        width = request.dimensions or self.dimensions[-1]
        job = Job(request, np.empty((len(rows), width), np.float32))
        if not rows:
            job.future.set_result(Rows(job.vectors))
        else:
            is_query = request.role == "query"
            self._scheduler.put(job, self._tokenize(job, rows) if is_query else None)
        return job.future

    def close(self, cancel: bool = False, wait: bool = True) -> None:
        """Finish what was accepted, or cancel what has not started, then stop the workers."""
        self._scheduler.close(cancel)
        for worker in self._workers if wait else ():
            if worker is not threading.current_thread():
                worker.join()

    def _prepare(self) -> None:
        """Work of the first threads: documents to sequences, a few steps ahead of the device."""
        while (chunk := self._scheduler.next_chunk()) is not None:
            self._scheduler.add(self._prepare_chunk(chunk))
            del chunk  # else a thread that waits would keep the last documents in memory

    def _prepare_chunk(self, chunk: list[tuple[Job, int]]) -> list[TokenSequence]:
        """Return the sequences of some documents, each a job and its row there."""
        sequences: list[TokenSequence] = []
        for job, pairs in groupby(chunk, key=lambda pair: pair[0]):
            rows: dict[bool, list[int]] = {False: [], True: []}
            for _, row in pairs:
                rows[job.request.documents[row].image is not None].append(row)
            sequences += self._tokenize(job, rows[False])
            for row in rows[True]:
                if not job.is_cancelled:
                    sequences += self._prepare_image(job, row)
        return sequences

    def _tokenize(self, job: Job, rows: list[int]) -> list[TokenSequence]:
        """Return the sequences of texts, without those that failed."""
        request = job.request
        texts = [request.documents[row].text or "" for row in rows]
        try:
            ids = self._tokenizer.encode(texts, request.role, request.truncate)
        except Exception as exc:
            _fail(job, rows, EngineError(f"the tokenizer failed: {exc}"), exc)
            return []
        sequences = []
        for row, given in zip(rows, ids, strict=True):
            if isinstance(given, InputTooLongError):
                job.fail(row, given)
            else:
                sequences.append(TokenSequence(job, row, given))
        return sequences

    def _prepare_image(self, job: Job, row: int) -> list[TokenSequence]:
        """Return the sequence of an image, with its text if it has one; none where it failed."""
        assert self._vision is not None
        document, vision = job.request.documents[row], self._vision
        try:
            prepare = images.decode_picture if self._cuts_on_device else images.cut_tiles
            tiles = prepare(document.image, vision.max_tiles, vision.tile_size, self._image_urls)
            if self._cuts_on_device:  # here: the one thread that computes would keep a GPU waiting
                tiles = pin_image(tiles)
            ids = self._tokenizer.encode_with_image(
                len(tiles), document.text or "", job.request.truncate
            )
        except InputError as exc:
            job.fail(row, exc)
            return []
        except Exception as exc:
            _fail(job, [row], EngineError(f"preparing it failed: {exc}"), exc)
            return []
        return [TokenSequence(job, row, ids, tiles, len(tiles) * vision.patches_per_tile)]

    def _compute(self, device: int) -> None:
        """Work of a device's thread: one step after another.

        A GPU is given a step while it computes the one before, and so never waits for this thread.
        """
        if is_gpu := (gpu := self._encoders[device].device).type == "cuda":
            torch.cuda.set_device(gpu)  # else pinned memory would wake the first GPU, too
        self._run_steps(device)
        del self._encoders[device]
        if is_gpu:
            if not self._encoders:
                _gpu_users.discard(self)
            release_gpu_memory(of_cublas=not _gpu_users)

    def _run_steps(self, device: int) -> None:
        running: deque[Running] = deque()
        while True:
            step = self._scheduler.take_step() if running else self._scheduler.next_step()
            if step is None:
                return
            encoder = self._encoders[device]
            running += self._start(step, encoder)
            while running and not (step and encoder.runs_ahead and len(running) == 1):
                self._collect(*running.popleft())
            del step  # as in `_prepare`

    def _start(
        self, step: list[TokenSequence], encoder: Encoder, is_retry: bool = False
    ) -> list[Running]:
        """Start a step; where memory runs out, its halves, and a lone sequence once more."""
        if not step:
            return []
        try:
            ids, tiles = [each.ids for each in step], [each.tiles for each in step]
            return [(step, encoder(ids, tiles))]
        except Exception as exc:
            error = exc.with_traceback(None)  # the traceback would keep the step's tensors alive
        if not is_out_of_memory(error) or is_retry:
            return [(step, error)]
        if encoder.device.type == "cuda":
            torch.cuda.empty_cache()
        if len(step) == 1:
            return self._start(step, encoder, is_retry=True)
        tokens = _cost(step)
        self._scheduler.shrink(tokens // 2)
        _log.warning("out of memory at %d tokens per step; going on with half", tokens)
        half = len(step) // 2
        return [*self._start(step[:half], encoder), *self._start(step[half:], encoder)]

    def _collect(self, step: list[TokenSequence], pooled: PooledOutput | Exception) -> None:
        """Wait for a step and deliver its rows, or what went wrong."""
        error = None
        try:
            if isinstance(pooled, Exception):
                raise pooled
            vectors = pooled.numpy()  # (S, hidden)
            self._scheduler.grow(_cost(step))
        except Exception as exc:
            error = exc.with_traceback(None)
            if is_fatal(error):
                self.failure = error
        start = 0
        for job, group in groupby(step, key=lambda sequence: sequence.job):
            members = list(group)
            rows = [sequence.row for sequence in members]
            tokens = sum(len(sequence.ids) for sequence in members)
            if error is None:
                job.deliver(rows, vectors[start : start + len(rows)], tokens)
            elif is_out_of_memory(error):
                message = f"does not fit in the device's memory ({tokens} tokens)"
                _fail(job, rows, DeviceMemoryError(message), error)
            else:
                _fail(job, rows, EngineError(f"the forward pass failed: {error}"), error)
            start += len(rows)


def _cost(step: list[TokenSequence]) -> int:
    return sum(sequence.cost for sequence in step)


def _fail(job: Job, rows: list[int], error: NeMoRetrieverError, cause: Exception) -> None:
    error.__cause__ = cause
    for row in rows:
        job.fail(row, error)
