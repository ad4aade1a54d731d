"""Observers of LlamaIndex: its instrumentation events and its callbacks."""

from __future__ import annotations

from typing import Any

from llama_index.core.callbacks import CBEventType
from llama_index.core.callbacks.base_handler import BaseCallbackHandler
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events import BaseEvent
from llama_index.core.instrumentation.events.embedding import EmbeddingEndEvent


class Recorder(BaseEventHandler):
    events: list[BaseEvent] = []  # noqa: RUF012 - a pydantic field, copied for each object

    def handle(self, event: BaseEvent, **_: Any) -> None:
        self.events.append(event)

    def embedded(self) -> list[str]:
        """Return the texts of the embedding calls since the last time, in order."""
        ended = [event for event in self.events if isinstance(event, EmbeddingEndEvent)]
        self.events.clear()
        return [chunk for event in ended for chunk in event.chunks]


class Callbacks(BaseCallbackHandler):
    def __init__(self) -> None:
        super().__init__([], [])
        self.seen: list[tuple[str, CBEventType, dict[str, Any]]] = []

    def on_event_start(
        self, event_type: CBEventType, payload: dict[str, Any] | None = None, *_: Any, **__: Any
    ) -> str:
        self.seen.append(("start", event_type, payload or {}))
        return ""

    def on_event_end(
        self, event_type: CBEventType, payload: dict[str, Any] | None = None, *_: Any, **__: Any
    ) -> None:
        self.seen.append(("end", event_type, payload or {}))

    def start_trace(self, trace_id: str | None = None) -> None:
        pass

    def end_trace(self, *_: Any, **__: Any) -> None:
        pass
