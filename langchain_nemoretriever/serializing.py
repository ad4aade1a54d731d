"""Serialization of an adapter by LangChain's `dumps`."""

from __future__ import annotations

from langchain_core.load.serializable import Serializable

from shared_engine.options import EngineOptions


class SerializableOptions(Serializable):
    """Writes the options without key, headers and proxy; `loads` takes the key from NVIDIA_API_KEY.

    The last base of an adapter.
    """

    model_config = EngineOptions.model_config  # not Serializable's, which ignores unknown options

    @classmethod
    def is_lc_serializable(cls) -> bool:
        """Return True: LangChain's `dumps` and `loads` support this class."""
        return True

    @property
    def lc_secrets(self) -> dict[str, str]:
        """The environment variable of each secret option."""
        return {"api_key": "NVIDIA_API_KEY"}
