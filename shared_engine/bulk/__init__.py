"""Embed files of documents into files of vectors.

job.py        what to embed, cut into fragments ......... Job, Fragment
urls.py       tables by path or URL
convert.py    CSV, JSON Lines and Arrow to Parquet, once
tables.py     rows of Parquet; types and errors of Arrow
rows.py       rows of all of these as documents
ids.py        a check for ids that two rows share
fragment.py   one fragment to one file, in any process .. embed_fragment
manifest.py   the folder of results                       files.py   files written as a whole
run.py        a job on this machine ..................... run_local
plan.py       an estimate of time, tokens and bytes
batch.py      a callable for Ray Data pipelines ......... EmbedBatch
"""

from typing import TYPE_CHECKING

from shared_engine._lazy import attach

if TYPE_CHECKING:
    from shared_engine.bulk.batch import EmbedBatch as EmbedBatch
    from shared_engine.bulk.fragment import embed_fragment as embed_fragment
    from shared_engine.bulk.job import Fragment as Fragment
    from shared_engine.bulk.job import Job as Job
    from shared_engine.bulk.manifest import Done as Done
    from shared_engine.bulk.run import run_local as run_local
else:
    __getattr__, __dir__ = attach(
        __name__,
        {
            "batch": ("EmbedBatch",),
            "fragment": ("embed_fragment",),
            "job": ("Fragment", "Job"),
            "manifest": ("Done",),
            "run": ("run_local",),
        },
        extra="bulk",
    )
