"""The backend of a model in this process: a queue, and threads that prepare and compute.

    submit ──► prepare (threads) ──► steps (one thread per device) ──► rows of the caller
                                     device_lock.py: one at a time, searches first

- Preparation tokenizes texts and decodes images, a few steps in advance. The tokenizers library
  uses all cores in one call; images have one thread per core.
- The caller's thread tokenizes the texts of searches, so they do not wait for documents.
- On a CPU, a step of documents or of a rerank takes seconds. It pauses several times in every
  layer, and waiting searches run in these pauses; within a rerank, those of other models. Any step
  whose requests were all cancelled ends there.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from functools import cached_property, partial
from itertools import groupby
from typing import TypeAlias

import numpy as np
import torch

from shared_engine.backend import Backend, Request, Rows, StepStats
from shared_engine.documents import Modality
from shared_engine.errors import (
    ConfigurationError,
    DeviceMemoryError,
    EngineClosedError,
    EngineError,
    InputError,
    InputTooLongError,
    NeMoRetrieverError,
    first_line,
)
from shared_engine.local.checkpoint import resolve
from shared_engine.local.device import Placement, make_current, select_devices
from shared_engine.local.device_errors import is_fatal, is_out_of_memory
from shared_engine.local.device_lock import lock_of
from shared_engine.local.fingerprint import digest_files, list_files
from shared_engine.local.jobs import Job, TokenSequence
from shared_engine.local.llama import Encoder, PooledOutput
from shared_engine.local.memory import pin_image, release_gpu_memory
from shared_engine.local.scheduler import Scheduler
from shared_engine.local.tokenizer import TextTokenizer
from shared_engine.local.vision_cache import KeyedImage
from shared_engine.options import EngineOptions
from shared_engine.threads import run_in_own_thread

Running: TypeAlias = tuple[list[TokenSequence], PooledOutput | Exception]
"""A step, and its output or the error of its start."""

_MAX_PREPARE_THREADS = 16
_MAX_UNPAUSED_TOKENS = 256
"""A step of searches that is longer, as of a rerank, yields the device to those of other models."""
_log = logging.getLogger("shared_engine")


class LocalBackend(Backend):
    """An embedding model or reranker on one or more devices, shared by any number of callers."""

    model = ""
    modalities: frozenset[Modality] = frozenset()
    description = ""

    def __init__(self, options: EngineOptions, load: Callable[..., Encoder] = Encoder) -> None:
        """Find or download the checkpoint, load it, and start the worker threads.

        Args:
            load: Creates the encoder of a device, with the arguments of `Encoder`.

        Raises:
            CheckpointError: the checkpoint is missing or not supported.
            ConfigurationError: a device is not available, has too little memory, or is not
                supported by this torch.
        """
        self._checkpoint = resolve(options)
        self._files = list_files(self._checkpoint.folder)
        self._vision = self._checkpoint.vision
        self._image_urls = options.allow_image_urls
        kinds: tuple[Modality, ...] = ("text", "image", "text_image")
        self.modalities = frozenset(kinds if self._vision else kinds[:1])
        self._tokenizer = TextTokenizer(self._checkpoint)
        # In a new thread: torch's OpenMP workers belong to the thread that computes first. If that
        # were the caller's thread, a child that it forks later would wait for these workers.
        try:
            placements, self._encoders = run_in_own_thread(self._load, options, load)
        except Exception as exc:
            if is_out_of_memory(exc):
                advice = "free memory there"
            elif isinstance(exc, torch.AcceleratorError):
                advice = "install a torch that supports this GPU"
            else:
                raise
            raise ConfigurationError(
                f"{self._checkpoint.name} cannot be loaded on device={options.device!r}: "
                f"{first_line(exc)}; {advice}, or use another device"
            ) from exc.with_traceback(None)  # its frames hold the tensors that were loaded
        self._scheduler = Scheduler(placements[0].max_batch_tokens)
        self._dtype = placements[0].dtype
        self._cuts_on_device = placements[0].device.type == "cuda"
        self.model = self._checkpoint.name
        self.dimensions = self._checkpoint.dimensions
        devices = "; ".join(encoder.description for encoder in self._encoders.values())
        self.description = f"{self.model} in this process on {devices}"
        if self._checkpoint.is_fp8:
            self.description += ", weights dequantized from FP8"
        if self._vision:
            self.description += f", {self._vision.description}"
        _log.info("%s", self.description)
        prepare_threads = min(os.cpu_count() or 1, _MAX_PREPARE_THREADS) if self._vision else 1
        work: dict[str, Callable[[], None]] = {
            f"nemoretriever-compute-{n}": partial(self._compute, n) for n in range(len(placements))
        }
        work |= {f"nemoretriever-prepare-{n}": self._prepare for n in range(prepare_threads)}
        self._workers = [
            threading.Thread(target=self._run_worker, args=(target,), name=name, daemon=True)
            for name, target in work.items()
        ]
        for worker in self._workers:
            worker.start()

    def _load(
        self, options: EngineOptions, load: Callable[..., Encoder]
    ) -> tuple[list[Placement], dict[int, Encoder]]:
        placements = select_devices(
            options.device, options.dtype, options.max_batch_tokens, self._checkpoint.config
        )
        encoders = {}
        for number, placement in enumerate(placements):
            with make_current(placement.device):
                encoders[number] = load(self._checkpoint, placement, self._tokenizer.size)
        return placements, encoders

    @cached_property
    def fingerprint(self) -> str:
        """A digest of the checkpoint's files and of the options that determine a vector.

        The first access reads all weights, at about 1 GB per second and core.

        Raises:
            CheckpointError: a file changed between loading and the first access.
        """
        checkpoint = self._checkpoint
        detail = checkpoint.vision and checkpoint.vision.detail
        limits = (checkpoint.max_tokens, checkpoint.max_tokens_with_image)
        files = digest_files(checkpoint.folder, self._files)
        parts = (checkpoint.prompts, str(self._dtype), detail, limits, files)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    @property
    def step_stats(self) -> StepStats:
        """Counts of all devices, and the current step size in tokens."""
        return replace(self._scheduler.stats)

    @property
    def gpu_memory(self) -> dict[str, int]:
        """See `Backend.gpu_memory`; of all models of the process."""
        devices = [encoder.device for encoder in list(self._encoders.values())]
        gpus = [device for device in devices if device.type == "cuda"]
        return {str(gpu): torch.cuda.memory_reserved(gpu) for gpu in gpus}

    def submit(self, request: Request) -> Future[Rows]:
        """Accept a request; see `Backend.submit`."""
        if self.failure is not None:
            raise EngineError(
                f"the engine failed ({first_line(self.failure)}), and this process "
                "cannot use its device again; restart the process"
            ) from self.failure
        if request.query is not None:
            self._tokenizer.check_query(request.query)
        rows = list(range(len(request.documents)))
        width = request.dimensions or self.dimensions[-1]
        job = Job(request, np.empty((len(rows), width), np.float32))
        if not rows:
            job.future.set_result(Rows(job.vectors))
        else:
            is_short = request.is_search and all(doc.image is None for doc in request.documents)
            self._scheduler.put(job, self._tokenize(job, rows) if is_short else None)
        return job.future

    def close(self, cancel: bool = False, wait: bool = True) -> None:
        """Finish the accepted requests, or cancel them with `cancel`, and stop the workers."""
        self._scheduler.close(cancel)
        for worker in self._workers if wait else ():
            if worker is not threading.current_thread():
                worker.join()

    def _run_worker(self, work: Callable[[], None]) -> None:
        """Do a thread's work; an error that it does not handle ends the engine: nobody waits."""
        try:
            work()
        except Exception as exc:
            self.failure = exc
            self._scheduler.close(cancel=True)
            raise

    def _prepare(self) -> None:
        """Prepare chunks of documents until the scheduler is closed; run by each prepare thread."""
        while (chunk := self._scheduler.next_chunk()) is not None:
            self._scheduler.add(self._prepare_chunk(chunk))
            del chunk  # otherwise a waiting thread would keep the last documents in memory

    def _prepare_chunk(self, chunk: list[tuple[Job, int]]) -> list[TokenSequence]:
        """Return the sequences of (job, row) pairs, without the rows that failed."""
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
        """Return the sequences of the texts in these rows, without the rows that failed."""
        request = job.request
        texts = [request.documents[row].text or "" for row in rows]
        try:
            if request.query is None:
                ids = self._tokenizer.encode(texts, request.role, request.truncate)
            else:
                ids = self._tokenizer.encode_pairs(request.query, texts, request.truncate)
        except Exception as exc:
            _fail(job, rows, EngineError(f"the tokenizer failed: {exc}"), exc)
            return []
        sequences = []
        for row, result in zip(rows, ids, strict=True):
            if isinstance(result, InputTooLongError):
                job.fail(row, result)
            else:
                sequences.append(TokenSequence(job, row, result))
        return sequences

    def _prepare_image(self, job: Job, row: int) -> list[TokenSequence]:
        """Return the sequence of an image and its text as a list, which is empty if it failed."""
        assert self._vision is not None
        document, vision = job.request.documents[row], self._vision
        try:
            assert document.image is not None
            tiles = vision.prepare(document.image, self._image_urls, self._cuts_on_device)
            if self._cuts_on_device:  # not in the compute thread, for which a GPU would wait
                tiles = pin_image(tiles)
            image = KeyedImage(tiles) if vision.cache_bytes else tiles
            ids = self._tokenizer.encode_with_image(
                tiles, document.text or "", job.request.truncate, job.request.query
            )
        except InputError as exc:
            job.fail(row, exc)
            return []
        except Exception as exc:
            _fail(job, [row], EngineError(f"preparing the image failed: {exc}"), exc)
            return []
        return [TokenSequence(job, row, ids, image, vision.count_patches(tiles))]

    def _compute(self, device: int) -> None:
        """Run steps on one device until the scheduler is closed; run by each compute thread."""
        if is_gpu := (gpu := self._encoders[device].device).type == "cuda":
            torch.cuda.set_device(gpu)  # otherwise pinned memory would initialize GPU 0 too
        self._run_steps(device)
        del self._encoders[device]
        if is_gpu:
            release_gpu_memory()

    def _run_steps(self, device: int) -> None:
        # A GPU gets its next step before the last one is collected, so it does not wait for this
        # thread.
        running: deque[Running] = deque()
        while True:
            step = self._scheduler.take_step() if running else self._scheduler.next_step()
            if step is None:
                return
            encoder = self._encoders[device]
            if step:
                running += self._hold_device(step, encoder)
            while running and not (step and encoder.runs_ahead and len(running) == 1):
                self._collect(*running.popleft())
            del step  # see `_prepare`

    def _hold_device(self, step: list[TokenSequence], encoder: Encoder) -> list[Running]:
        """Start a step while no other model uses the device; compute more steps of searches."""
        is_search, lock = step[0].job.request.is_search, lock_of(encoder.device)
        with lock.hold(is_search):
            started = self._start(step, encoder)
            while is_search and not encoder.runs_ahead and lock.may_continue():
                if not (step := self._scheduler.take_queries()):
                    break
                for running in started:
                    self._collect(*running)
                started = self._start(step, encoder)
        return started

    def _start(
        self, step: list[TokenSequence], encoder: Encoder, is_retry: bool = False
    ) -> list[Running]:
        """Start a step; if memory runs out, retry its halves, or a single sequence once."""
        if not step:
            return []
        try:
            ids, tiles = [each.ids for each in step], [each.tiles for each in step]
            if encoder.runs_ahead:
                return [(step, encoder(ids, tiles))]
            return [(step, encoder(ids, tiles, partial(self._pause, encoder, step)))]
        except Exception as exc:
            error = exc.with_traceback(None)  # a traceback keeps the tensors of its frames
        if not is_out_of_memory(error) or is_retry:
            return [(step, error)]
        if encoder.device.type == "cuda":
            release_gpu_memory()
        if len(step) == 1:
            return self._start(step, encoder, is_retry=True)
        tokens = _cost(step)
        self._scheduler.shrink(tokens // 2)
        _log.warning("out of memory in a step of %d tokens; retrying its halves", tokens)
        half = len(step) // 2
        return [*self._start(step[:half], encoder), *self._start(step[half:], encoder)]

    def _pause(self, encoder: Encoder, step: list[TokenSequence]) -> None:
        """Run waiting searches, of other models too, in a pause of a step.

        Raises:
            EngineClosedError: all requests of the step were cancelled. One long text takes minutes.
        """
        if all(sequence.job.is_cancelled for sequence in step):
            raise EngineClosedError("the requests of this step were cancelled")
        is_search = step[0].job.request.is_search
        if is_search and _cost(step) <= _MAX_UNPAUSED_TOKENS:
            return
        lock_of(encoder.device).yield_device(is_search)
        if not is_search:
            for running in self._start(self._scheduler.take_queries(), encoder):
                self._collect(*running)

    def _collect(self, step: list[TokenSequence], pooled: PooledOutput | Exception) -> None:
        """Wait for a step, and deliver its vectors or its error to the jobs."""
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
