"""Models at a NIM: the only package with a client of a server."""

from shared_engine.nim.backend import NimBackend as NimBackend
