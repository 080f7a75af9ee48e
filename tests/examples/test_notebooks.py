"""The notebooks run from top to bottom, and each result that ends a cell is shown as it prints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
pytest.importorskip("plotly")

NOTEBOOKS = sorted((Path(__file__).parents[2] / "examples" / "notebooks").glob("*.ipynb"))
SHOWN = {"calibration": "held out", "plan": "speed-up 1.5", "lamina.compare": "95 %", "front": "measured"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_without_what_it_showed_somebody(path: Path) -> None:
    cells = json.loads(path.read_text())["cells"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells if cell["cell_type"] == "code")


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_shows_its_results(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAMINA_CACHE", str(tmp_path / "cache"))
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = {}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            last = cell.source.splitlines()[-1]
            results = [output.data for output in cell.outputs if output.output_type == "execute_result"]
            shown[last] = results[0] if results else {}
    for last, said in SHOWN.items():
        (data,) = [data for line, data in shown.items() if line.startswith(last) and ".plot" not in line]
        assert data["text/html"].startswith("<pre") and said in data["text/html"], last
        assert data["text/plain"].startswith("<") and "\n" not in data["text/plain"]
    assert all("image/png" in data for line, data in shown.items() if line.endswith(".plot()"))
    assert (tmp_path / "report.html").exists()
