"""Bulk embedding and serving on a Ray cluster.

nodes.py      connect to a cluster; how many workers its nodes can hold
bulk.py       a bulk job on a cluster ................... run_ray
serving.py    server replicas behind one address, for `serve --replicas`
"""

from typing import TYPE_CHECKING

from shared_engine._lazy import attach

if TYPE_CHECKING:
    from shared_engine.distributed.bulk import run_ray as run_ray
else:
    __getattr__, __dir__ = attach(__name__, {"bulk": ("run_ray",)}, extra="ray")
