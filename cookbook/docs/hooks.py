"""Bring the guide, the notebooks and the table of options into the site."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from pydantic.fields import FieldInfo

from shared_engine import Options, RerankOptions

COOKBOOK = Path(__file__).resolve().parents[1]
OPTIONS = "<!-- options -->"


@event_priority(100)  # before mkdocs-jupyter looks for notebooks
def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the guide and the notebooks, which are in folders of their own."""
    for path in sorted((*COOKBOOK.glob("guide/*.md"), *COOKBOOK.glob("notebooks/*.ipynb"))):
        uri = path.relative_to(COOKBOOK).as_posix()
        files.append(File(uri, str(COOKBOOK), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Describe the options."""
    return markdown.replace(OPTIONS, describe_options()) if OPTIONS in markdown else markdown


def describe_options() -> str:
    """Return a section for each option: its type, default and description.

    A static reader of the source sees no description, as it is an argument of pydantic's `Field`.
    Options of rerankers follow, without those that are the same.
    """
    own = {
        name: field
        for name, field in RerankOptions.model_fields.items()
        if name not in Options.model_fields
        or field.description != Options.model_fields[name].description
    }
    embedders = _describe_fields(Options.model_fields)
    return f"{embedders}\n# Options of rerankers\n\n{_describe_fields(own)}"


def _describe_fields(fields: dict[str, FieldInfo]) -> str:
    sections = []
    for name, field in fields.items():
        kind = inspect.formatannotation(field.annotation).replace("pydantic.types.", "")
        default = field.get_default(call_default_factory=True)
        signature = f"```python\n{name}: {kind} = {default!r}\n```"
        sections.append(f"## {name}\n\n{signature}\n\n{field.description}\n")
    return "\n".join(sections)
