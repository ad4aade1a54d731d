"""Package attributes whose modules are imported at their first use."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from shared_engine.errors import MissingExtraError


def attach(
    package: str, names: Mapping[str, tuple[str, ...]], extra: str | None = None
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return `__getattr__` and `__dir__` for a package (PEP 562).

    Args:
        package: Full name of the package, its `__name__`.
        names: The public names of each of its modules.
        extra: The extra that has the third-party libraries of the modules.
    """
    owners = {name: module for module, listed in names.items() for name in listed}

    def get(name: str) -> Any:
        if name not in owners:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        with needs_extra(extra):
            return getattr(import_module(f"{package}.{owners[name]}"), name)

    return get, lambda: sorted(owners)


@contextmanager
def needs_extra(extra: str | None) -> Iterator[None]:
    """Turn the absence of a third-party library into the pip line of an extra, if there is one.

    Raises:
        MissingExtraError: a library is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as exc:
        if extra is None:
            raise
        raise MissingExtraError(
            f"{exc.name!r} is not installed: pip install 'nemoretriever-embeddings[{extra}]'"
        ) from exc
