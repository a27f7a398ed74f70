"""The notebooks run from the first cell to the last on the packaged model, and what is stored of them is clean."""

from __future__ import annotations

import json
from importlib import util
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "reports" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def outputs(notebook: dict) -> list[dict]:
    return [output for cell in notebook["cells"] if cell["cell_type"] == "code" for output in cell["outputs"]]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
# ipykernel says on every start that its sockets are plain; older jupyter-client warns of its own event loop.
@pytest.mark.filterwarnings("ignore:.*There is no current event loop:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*Proactor event loop:RuntimeWarning:zmq")
def test_every_cell_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # the matrices are tiny: threads would only wait for each other
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parents[1]))
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()  # raises CellExecutionError for the first cell that fails
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    pictures = [o for o in outputs(notebook) if "image/png" in o.get("data", {})]
    assert len(pictures) == sum(cell.source.rstrip().endswith(".figure") for cell in code) > 3


def test_there_are_two_notebooks() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["layer-statistics", "scan-to-training"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_stored_is_small_whole_and_names_no_machine(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    stored = json.loads(text)
    assert len(text) < 400_000
    assert not any(o["output_type"] in ("error", "stream") for o in outputs(stored))
    assert "site-packages" not in text and str(Path.home()) not in text


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_cells_are_those_of_the_script(path: Path) -> None:
    spec = util.spec_from_file_location("make_notebooks", FOLDER / "make.py")
    assert spec is not None and spec.loader is not None
    script = util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert ["".join(cell["source"]) for cell in json.loads(path.read_text())["cells"]] == script.NOTEBOOKS[path.stem]
