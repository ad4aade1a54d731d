"""Retrieval quality on your own data: the only package with ir-measures, bm25s and matplotlib."""

from typing import TYPE_CHECKING

from shared_engine._lazy import attach

if TYPE_CHECKING:
    from shared_engine.evaluate.measure import Report as Report
    from shared_engine.evaluate.measure import evaluate as evaluate
    from shared_engine.evaluate.models import EngineModel as EngineModel
    from shared_engine.evaluate.models import EngineReranker as EngineReranker
    from shared_engine.evaluate.models import find_model as find_model
    from shared_engine.evaluate.models import find_reranker as find_reranker
    from shared_engine.evaluate.mteb import MTEBModel as MTEBModel
    from shared_engine.evaluate.mteb import run_tasks as run_tasks
    from shared_engine.evaluate.mteb import write_tasks as write_tasks
else:
    __getattr__, __dir__ = attach(
        __name__,
        {
            "measure": ("Report", "evaluate"),
            "models": ("EngineModel", "EngineReranker", "find_model", "find_reranker"),
            "mteb": ("MTEBModel", "run_tasks", "write_tasks"),
        },
        extra="evaluate",
    )
