"""Where the model runs: in this process, at a NIM or in NVIDIA's catalogue, and the reason."""

from __future__ import annotations

import logging
import os
from typing import NamedTuple

from pydantic import SecretStr

from shared_engine.catalogue import lookup, report_task
from shared_engine.endpoints import HOSTED, is_hosted, normalize_url
from shared_engine.errors import ConfigurationError
from shared_engine.options import EngineOptions, Scope

_FOLDERS = ("/", "./", "../", "~")
"""Beginnings of a model's name that can only be a folder."""


class Choice(NamedTuple):
    """Which backend runs, and why."""

    base_url: str | None
    """Address of the NIM; None for a model in this process."""
    api_key: SecretStr | None
    reason: str
    level: int = logging.INFO
    """Log level of the reason."""

    @property
    def scope(self) -> Scope:
        """The scope of the options that concern this backend alone."""
        return "local" if self.base_url is None else "nim"


def select_backend(options: EngineOptions) -> Choice:
    """Choose a backend from the options, then from the environment.

    | the first that applies                                   | backend                       |
    |----------------------------------------------------------|-------------------------------|
    | `backend="local"`                                        | this process                  |
    | `base_url=`                                              | a NIM at that address         |
    | `backend="nim"` or `api_key=`                            | NVIDIA_BASE_URL, or catalogue |
    | an option for this process alone, or a folder as `model` | this process                  |
    | NVIDIA_BASE_URL                                          | a NIM at that address         |
    | nothing                                                  | this process                  |

    >>> from shared_engine.options import Options
    >>> select_backend(Options(base_url="http://nim:8000")).base_url
    'http://nim:8000/v1'
    >>> select_backend(Options(backend="local", api_key="nvapi-...")).base_url is None
    True

    Raises:
        ConfigurationError: a key is needed and missing, two options contradict each other, or the
            model is known to compute something else.
    """
    spec = lookup(options.model)
    if spec is not None and spec.task != options.task:
        raise report_task(spec.name, spec.task)
    variable = os.environ.get("NVIDIA_BASE_URL", "").strip()
    is_explicit = options.backend == "nim" or options.api_key is not None
    only_local = [f"{name}=" for name in options.list_given("local")]
    if options.backend == "local":
        if options.base_url is not None:
            raise ConfigurationError('base_url= contradicts backend="local"; leave one of them out')
        return Choice(None, None, 'backend="local" is given, so this process')
    if options.base_url is None and not is_explicit:
        if options.model and options.model.startswith(_FOLDERS):
            only_local.insert(0, "a folder as model=")
        if not variable:
            hint = "" if only_local else explain_key_in_environment()
            reason = f"neither base_url= nor api_key= is given, so this process{hint}"
            return Choice(None, None, reason, logging.WARNING if hint else logging.INFO)
        if only_local:
            reason = f"{only_local[0]} is given, so this process, not the NIM of NVIDIA_BASE_URL"
            return Choice(None, None, reason)
    base_url, reason = _find_address(options, variable)
    if only_local:
        raise ConfigurationError(
            f"{', '.join(only_local)} applies to a model in this process, but {reason}; leave one "
            'of them out, or use backend="local"'
        )
    return Choice(base_url, _find_key(options, base_url), reason)


def _find_address(options: EngineOptions, variable: str) -> tuple[str, str]:
    """Return the address of the NIM, and the reason for it."""
    if options.base_url is not None:
        return options.base_url, "base_url= is given"
    if variable:
        return normalize_url(variable, "NVIDIA_BASE_URL"), "NVIDIA_BASE_URL is set"
    given = "api_key=" if options.backend == "auto" else 'backend="nim"'
    return HOSTED, f"{given} is given and no base_url=, so NVIDIA's catalogue"


def explain_key_in_environment() -> str:
    """Return a hint on NVIDIA_API_KEY if it is set, otherwise an empty text."""
    if not os.environ.get("NVIDIA_API_KEY", "").strip():
        return ""
    return (
        ". NVIDIA_API_KEY is set, but alone never selects NVIDIA's catalogue; use "
        'backend="nim" and a hosted model= for that'
    )


def _find_key(options: EngineOptions, base_url: str) -> SecretStr | None:
    given = options.api_key
    assert not isinstance(given, str)  # its validator made it a SecretStr
    if given is not None and given.get_secret_value():
        return given
    value = os.environ.get("NVIDIA_API_KEY", "").strip()
    if not value and given is not None:
        raise ConfigurationError(
            "api_key= is empty. Pickled options leave it out; set NVIDIA_API_KEY in the process "
            "that loads them"
        )
    if not value and is_hosted(base_url):
        raise ConfigurationError(
            "NVIDIA's catalogue needs a key; pass api_key= or set NVIDIA_API_KEY"
        )
    return SecretStr(value) if value else None
