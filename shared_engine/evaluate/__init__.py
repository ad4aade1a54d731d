"""Retrieval quality on your own data: the only room with ir-measures, bm25s and matplotlib."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from shared_engine.errors import MissingExtraError

if TYPE_CHECKING:
    from shared_engine.evaluate.measure import Report as Report
    from shared_engine.evaluate.measure import evaluate as evaluate
    from shared_engine.evaluate.models import EngineModel as EngineModel
    from shared_engine.evaluate.models import find_model as find_model
    from shared_engine.evaluate.mteb import MTEBModel as MTEBModel
    from shared_engine.evaluate.mteb import run_tasks as run_tasks
    from shared_engine.evaluate.mteb import write_tasks as write_tasks
else:
    _MODULES = {
        "EngineModel": "models",
        "MTEBModel": "mteb",
        "Report": "measure",
        "evaluate": "measure",
        "find_model": "models",
        "run_tasks": "mteb",
        "write_tasks": "mteb",
    }

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        try:
            return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
        except ModuleNotFoundError as exc:
            line = "mteb" if _MODULES[name] == "mteb" else "'nemoretriever-embeddings[evaluate]'"
            raise MissingExtraError(f"this needs {exc.name!r}: pip install {line}") from exc
