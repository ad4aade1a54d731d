"""Models at a NIM: the only room that speaks to one."""

from shared_engine.nim.backend import NimBackend as NimBackend
