"""The notebook runs from its first cell to its last, and what it shows in the repository is such a run."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

TOUR = Path(__file__).parent.parent / "docs" / "tour.ipynb"


@pytest.mark.slow
def test_the_tour_runs(tmp_path: Path) -> None:
    notebook = nbformat.read(TOUR, as_version=4)
    NotebookClient(
        notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    made = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in made) >= 4
    assert "block 7, sparse: |p| = " in "".join(output.get("text", "") for output in made)


def test_the_tour_is_kept_as_it_ran() -> None:
    cells = nbformat.read(TOUR, as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert all(cell.outputs for cell in code[1:])
    kept = str([cell.outputs for cell in code])
    assert "error" not in {output.output_type for cell in code for output in cell.outputs}
    assert not any(word in kept for word in ("/home/", "/root/", "/tmp/", "site-packages"))
