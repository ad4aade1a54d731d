"""Where the model runs: here, at a NIM or in the catalogue, decided once and with the reason."""

from __future__ import annotations

import logging
import os
from typing import NamedTuple

from pydantic import SecretStr

from shared_engine.endpoints import HOSTED, is_hosted, is_safe_for_keys, normalised
from shared_engine.errors import ConfigurationError
from shared_engine.options import Options

_ONLY_HERE = ("checkpoint", "revision", "max_tokens", "max_tiles")
"""Options that would change the vectors, and that a NIM cannot be told."""


_log = logging.getLogger("shared_engine")


class Choice(NamedTuple):
    """Which engine runs, and why."""

    base_url: str | None
    """Address of the NIM, or None for a model in this process."""
    api_key: SecretStr | None
    reason: str


def choose(options: Options) -> Choice:
    """Decide from what was said: a base_url, a key, or neither.

    >>> choose(Options(base_url="http://nim:8000")).base_url
    'http://nim:8000/v1'

    Raises:
        ConfigurationError: a key is needed and missing, or an option makes no sense with a NIM.
    """
    url = os.environ.get("NVIDIA_BASE_URL")
    if options.base_url is not None:
        base_url, reason = options.base_url, "base_url is given"
    elif url:
        base_url, reason = normalised(url), "NVIDIA_BASE_URL is set"
    elif options.api_key is not None:
        base_url, reason = HOSTED, "a key is given and no base_url, so NVIDIA's catalogue"
    else:
        return Choice(None, None, "neither base_url nor a key is given, so this process")
    for name in _ONLY_HERE:
        if getattr(options, name) is not None:
            raise ConfigurationError(
                f"{name}= is for a model in this process, but {reason}; leave one of them out"
            )
    return Choice(base_url, _key(options, base_url), reason)


def _key(options: Options, base_url: str) -> SecretStr | None:
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
    if value and given is None and not (options.allow_insecure_key or is_safe_for_keys(base_url)):
        _log.warning("NVIDIA_API_KEY is not sent to %s, which has no TLS", base_url)
        return None
    return SecretStr(value) if value else None
