"""The notebooks run from the first cell to the last, in a fast mode."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

COLABS = Path(__file__).parents[1] / "colabs"

# What each notebook is about.
PRINTED = {
    "quickstart.ipynb": ("dead units", "gradient norm"),
    "weight_normalization.ipynb": ("dead units", "gradient norm"),
    "initializer_comparison.ipynb": ("sparse_he_normal", "signal kept", "cut at one sigma: 0.005396"),
    "kaiming_and_gain.ipynb": ("PyTorch's default", "std: theory", "mean: theory"),
    "relu_zeros.ipynb": ("dead units", "activation patterns"),
    "signal_propagation.ipynb": ("dead units", "std(output)"),
    "calibration.ipynb": (
        "Spearman correlation of zeros",
        "is an affine function on the data",
        "Spearman correlation of L_gen",
    ),
    "lottery_tickets.ipynb": ("accuracy %", "RigL", "from prune to lottery"),
    "other_models.ipynb": ("off the mask, the largest: 0", "from 1.000000 to 1.000000", "inside the loop over time"),
    "which_initialization.ipynb": ("singular values", "best learning rate", "those that stayed are the same: True"),
    "output_range.ipynb": ("[-0.5, 1]", "width of the bounds", "by method exact"),
}


@pytest.fixture(params=sorted(path.name for path in COLABS.glob("*.ipynb")))
def executed(request, tmp_path, monkeypatch):
    """A notebook's name, and it after its execution in an empty directory, without the cell of the installation."""
    monkeypatch.setenv("KERAS_SPARSE_INIT_FAST", "1")
    notebook = nbformat.read(COLABS / request.param, as_version=4)
    options = {"timeout": 300, "skip_cells_with_tag": "skip-execution"}
    NotebookClient(
        notebook, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}, **options
    ).execute()
    return request.param, notebook


def _printed(notebook):
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return "".join(output.get("text", "") for output in outputs), outputs


def test_a_notebook_runs_and_shows_its_tables_and_plots(executed):
    name, notebook = executed
    text, outputs = _printed(notebook)
    assert all(expected in text for expected in PRINTED[name])
    assert any("image/png" in output.get("data", {}) for output in outputs)


def test_only_the_installation_is_left_out():
    for path in COLABS.glob("*.ipynb"):
        skipped = [c for c in nbformat.read(path, 4).cells if "skip-execution" in c.metadata.get("tags", [])]
        assert [cell.source.split()[:2] for cell in skipped] == [["%pip", "install"]]
