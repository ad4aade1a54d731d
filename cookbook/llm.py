"""A language model for trial without a network: OpenAI's protocol, served in this process.

The weights are SmolLM2-135M-Instruct, whole: the file that the stand-in is made of (standin.py).
A model of 135 million parameters writes English and knows little: **its answers are often wrong**.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import standin  # beside this file

NAME = "SmolLM2-135M-Instruct"
CAVEAT = (
    "A small model that runs anywhere and is often wrong: trust the sources, which are what this "
    "package finds, and not the sentence."
)
_CONTEXT = 4096  # tokens of a prompt and its answer
_ANSWER = 80  # tokens of an answer at most


@contextmanager
def serve() -> Iterator[str]:
    """Serve it at a free port of this machine; give the address, which ends in /v1.

    Raises:
        ImportError: xllamacpp is not installed.
        ValueError, RuntimeError: as `standin.fetch_gguf`.
    """
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(standin.fetch_gguf())
    params.model_alias = [NAME]
    params.n_ctx = _CONTEXT
    params.n_parallel = 1
    params.port = 0
    params.cpuparams.n_threads = os.cpu_count() or 1
    params.n_predict = _ANSWER
    # Else a small model says one sentence again and again; a penalty on single words would keep it
    # from those of its sources.
    params.sampling.dry_multiplier = 0.8
    params.sampling.dry_allowed_length = 4
    params.verbosity = -1  # it would write pages of details to the screen
    params.use_jinja = True  # for tools
    params.warmup = False
    params.ui = False
    server = xllamacpp.Server(params)
    try:
        yield f"{server.listening_address}/v1"
    finally:
        del server  # which stops it
