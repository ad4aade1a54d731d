"""An environment without keys, addresses and proxies, for all tests of the remote backend."""

from __future__ import annotations

import pytest

PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NVIDIA_API_KEY", "NVIDIA_BASE_URL", *PROXIES, *map(str.upper, PROXIES)):
        monkeypatch.delenv(name, raising=False)
