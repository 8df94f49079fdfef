"""The notebook runs from its first cell to its last, in a kernel of its own, and holds no outputs in the checkout."""

from __future__ import annotations

import os

import pytest
from pages import ROOT

NOTEBOOK = ROOT / "docs" / "notebooks" / "from-python.ipynb"


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    client = nbclient.NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    (report,) = (tmp_path / "runs" / "notebook").glob("report.html")
    assert report.stat().st_size > 10_000
    last = notebook.cells[-1].outputs[-1]
    assert last["data"]["text/plain"] == "True"
    printing = next(cell for cell in notebook.cells if "for metrics in history" in cell.source)
    steps = "".join(output.get("text", "") for output in printing.outputs)  # a stream may come in pieces
    assert [line.split(":")[0] for line in steps.splitlines()] == ["step 1", "step 2", "step 3"]
