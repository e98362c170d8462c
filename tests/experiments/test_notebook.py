"""The notebook runs from top to bottom in a fresh kernel, and is small."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent.parent
NOTEBOOK = ROOT / "experiments" / "rho1_colab.ipynb"


@pytest.mark.nightly  # what its cells call, other tests call
def test_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("XLA_FLAGS", raising=False)  # a user has no simulated devices
    notebook = nbformat.read(NOTEBOOK, 4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path}}).execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in cells)
    pictures = [o for cell in cells for o in cell.outputs if "image/png" in o.get("data", {})]
    assert len(pictures) == 2
    assert len(nbformat.writes(notebook)) < 300_000


def test_is_small_and_names_one_repository():
    text = NOTEBOOK.read_text()
    assert len(text) < 300_000
    assert set(re.findall(r"github(?:\.com)?/([\w-]+/\w+)", text)) == {"rho1-jax/rho1_jax"}
