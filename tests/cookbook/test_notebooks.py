"""Every cell of every notebook runs; what is committed is small and says nothing of a machine."""

from __future__ import annotations

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.conftest import ROOT

FOLDER = ROOT / "cookbook" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_what_is_committed_has_outputs_and_no_paths(path: Path) -> None:
    content = path.read_text()
    assert len(content) < 300_000
    notebook = nbformat.reads(content, as_version=4)
    nbformat.validate(notebook)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert outputs
    assert all(
        output.output_type != "error" and output.get("name") != "stderr" for output in outputs
    )
    assert str(Path.home()) not in content
    assert str(ROOT) not in content


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # those of Jupyter's own machinery
@pytest.mark.usefixtures("standin")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_every_cell_runs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT)]))
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}}
    )
    client.execute()  # a cell that raises ends it
