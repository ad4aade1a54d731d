"""Bulk embedding and serving on a Ray cluster.

nodes.py      connect to a cluster; how many workers its nodes can hold
bulk.py       a bulk job on a cluster ................... run_ray
serving.py    server replicas behind one address, for `serve --replicas`
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shared_engine.distributed.bulk import run_ray as run_ray
else:

    def __getattr__(name: str) -> Any:
        if name == "run_ray":
            from shared_engine.bulk import needs_extra

            with needs_extra("ray"):
                from shared_engine.distributed.bulk import run_ray

                return run_ray
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
