"""The notebook runs from top to bottom. ``python -m tests.test_notebook`` runs it and writes its outputs."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).parents[1] / "docs" / "quick-start.ipynb"
MOST_BYTES = 600_000
PICTURES = 8


def run(folder: str) -> Any:
    """Runs the notebook in a folder and returns it with its outputs."""
    import nbclient
    import nbformat

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=900, kernel_name="python3", record_timing=False,
                                     resources={"metadata": {"path": folder}})  # fmt: skip
    client.execute(env={"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": str(NOTEBOOK.parents[1])})
    return notebook


def outputs(notebook: Any) -> list[dict[str, Any]]:
    return [output for cell in notebook["cells"] for output in cell.get("outputs", ())]


def pictures(notebook: Any) -> int:
    kinds = [kind for output in outputs(notebook) for kind in output.get("data", {})]
    return kinds.count("image/png") + kinds.count("image/gif")


def test_the_notebook_is_small_and_has_its_outputs():
    notebook = json.loads(NOTEBOOK.read_text())
    assert NOTEBOOK.stat().st_size < MOST_BYTES
    assert pictures(notebook) == PICTURES
    assert not any(output["output_type"] == "error" or output.get("name") == "stderr" for output in outputs(notebook))
    counts = [cell["execution_count"] for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert counts == [*range(1, len(counts) + 1)], "run it from top to bottom: python -m tests.test_notebook"
    assert "/" + "tmp/" not in NOTEBOOK.read_text()


@pytest.mark.slow
@pytest.mark.trainings
def test_the_notebook_runs_from_top_to_bottom(tmp_path: Path):
    pytest.importorskip("nbclient")
    assert pictures(run(str(tmp_path))) == PICTURES


if __name__ == "__main__":
    import nbformat

    with tempfile.TemporaryDirectory() as folder:
        nbformat.write(run(folder), NOTEBOOK)
    sys.exit()
