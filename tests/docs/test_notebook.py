"""The notebook runs from its first cell to its last, and holds no outputs in the checkout."""

from __future__ import annotations

import ast
import json
import os

import pytest
from pages import ROOT

NOTEBOOK = ROOT / "docs" / "notebooks" / "from-python.ipynb"


@pytest.mark.slow
def test_the_cells_run_one_after_the_other(tmp_path, monkeypatch, capsys):
    """In this process; below in a kernel."""
    monkeypatch.chdir(tmp_path)
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert not any(cell.get("outputs") for cell in cells)
    names: dict = {}
    for source in ("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"):
        capsys.readouterr()
        exec(compile(source, "cell", "exec"), names)
        if "for metrics in history" in source:
            printed = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in printed] == ["step 1", "step 2", "step 3"]
    last = ast.parse(source).body[-1]
    assert isinstance(last, ast.Expr) and eval(ast.unparse(last), names) is True
    assert (tmp_path / "runs" / "notebook" / "report.html").stat().st_size > 10_000


@pytest.mark.long
def test_the_notebook_runs_in_a_kernel(tmp_path, monkeypatch):
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
