"""Where the model runs: here, at a NIM or in the catalogue, decided once and with the reason."""

from __future__ import annotations

import logging
import os
from typing import NamedTuple

from pydantic import SecretStr

from shared_engine.endpoints import HOSTED, find_exposure, is_hosted, normalize_urls
from shared_engine.errors import ConfigurationError
from shared_engine.options import Options, Scope

_FOLDERS = ("/", "./", "../", "~")
"""How a model's name begins where it can only be a folder."""

_log = logging.getLogger("shared_engine")


class Choice(NamedTuple):
    """Which engine runs, and why."""

    base_url: str | None
    """Address of the NIM, several with commas in between, or None for a model in this process."""
    api_key: SecretStr | None
    reason: str
    level: int = logging.INFO
    """How loudly the reason is logged."""

    @property
    def scope(self) -> Scope:
        """The scope of the options that concern this engine alone."""
        return "local" if self.base_url is None else "nim"


def select_backend(options: Options) -> Choice:
    """Decide from what was said: a backend, an address, a key, or options that only fit here.

    What is given in the code wins over the environment, which NVIDIA's other clients read, too.

    >>> select_backend(Options(base_url="http://nim:8000")).base_url
    'http://nim:8000/v1'
    >>> select_backend(Options(backend="local", api_key="nvapi-...")).base_url is None
    True

    Raises:
        ConfigurationError: a key is needed and missing, or two options contradict each other.
    """
    variable = os.environ.get("NVIDIA_BASE_URL", "").strip()
    only_here = [f"{name}=" for name in options.list_given("local")]
    if options.backend == "local":
        if options.base_url is not None:
            raise ConfigurationError('base_url= is given beside backend="local"; leave one out')
        return Choice(None, None, 'backend="local" is given, so this process')
    if options.base_url is not None:
        base_url, reason = options.base_url, "base_url= is given"
    elif options.backend == "auto" and options.api_key is None:
        if options.model.startswith(_FOLDERS):
            only_here.insert(0, "a folder as model=")
        if not variable:
            reason, hint = "neither base_url= nor api_key= is given, so this process", ""
            if not only_here:
                hint = explain_key_in_environment()
            return Choice(None, None, reason + hint, logging.WARNING if hint else logging.INFO)
        if only_here:
            return Choice(None, None, f"{only_here[0]} is given, so this process, not the NIM of "
                          "NVIDIA_BASE_URL")  # fmt: skip
        base_url, reason = normalize_urls(variable), "NVIDIA_BASE_URL is set"
    elif variable:
        base_url, reason = normalize_urls(variable), "NVIDIA_BASE_URL is set"
    else:
        given = "api_key=" if options.backend == "auto" else 'backend="nim"'
        base_url, reason = HOSTED, f"{given} is given and no base_url=, so NVIDIA's catalogue"
    if only_here:
        raise ConfigurationError(
            f"{', '.join(only_here)} would be for a model in this process, but {reason}; leave one "
            'of them out, or give backend="local"'
        )
    return Choice(base_url, _find_key(options, base_url), reason)


def explain_key_in_environment() -> str:
    """Return what to tell somebody whose model could not be loaded here, or nothing."""
    if not os.environ.get("NVIDIA_API_KEY", "").strip():
        return ""
    return (
        ". NVIDIA_API_KEY is set, which alone sends no text anywhere: "
        'backend="nim" computes in NVIDIA\'s catalogue'
    )


def _find_key(options: Options, base_url: str) -> SecretStr | None:
    given = options.api_key
    if given is not None and given.get_secret_value():
        return given
    value = os.environ.get("NVIDIA_API_KEY", "").strip()
    if not value and given is not None:
        raise ConfigurationError(
            "api_key is empty. Pickled options leave it out: set NVIDIA_API_KEY where they are "
            "loaded"
        )
    if not value and is_hosted(base_url):
        raise ConfigurationError("NVIDIA's catalogue needs a key: give api_key=, or NVIDIA_API_KEY")
    if value and given is None and not options.allow_insecure_key:
        way = find_exposure(base_url, options.proxy, bool(options.http_client_factory))
        if way is not None:
            _log.warning("NVIDIA_API_KEY is not sent: it would travel unencrypted %s", way)
            return None
    return SecretStr(value) if value else None
