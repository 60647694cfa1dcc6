"""The notebook runs from top to bottom, on runs it trains itself and on given ones, and is committed with its outputs."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from test_report import write_run

from inflora.report.tables import MEANINGS

pytestmark = pytest.mark.timeout(600)  # two trainings: seconds each, minutes on a busy machine

NOTEBOOK = Path(__file__).parent.parent / "experiments" / "notebooks" / "accuracy_and_forgetting.ipynb"


def execute(**parameters: Any) -> Any:
    """Run the notebook where it lies, with other values in its parameter cell; an error in a cell raises."""
    notebook: Any = nbformat.read(NOTEBOOK, as_version=4)
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    names = re.findall(r"^(\w+) = ", cell.source, flags=re.MULTILINE)
    assert set(parameters) <= set(names), "a parameter that the notebook does not have"
    cell.source += "".join(f"\n{name} = {value!r}" for name, value in parameters.items())
    return NotebookClient(notebook, timeout=560, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()


def outputs(notebook: Any, kind: str) -> Iterator[str]:
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if kind in output.get("data", {}):
                yield output["data"][kind]


def printed(notebook: Any) -> str:
    return "".join(output["text"] for cell in notebook.cells for output in cell.get("outputs", []) if output["output_type"] == "stream")


def test_trains_and_shows_two_methods(tmp_path: Path):
    notebook = execute(TRAIN_INTO=str(tmp_path), OVERRIDES=["debug=default"])
    assert {folder.name for folder in tmp_path.iterdir()} == {"inflora", "sequential"}
    assert (tmp_path / "inflora" / "summary.json").exists()
    table, differences = outputs(notebook, "text/html")
    assert "inflora" in table
    assert "sequential" in table
    assert "sequential" in differences
    assert len(list(outputs(notebook, "image/png"))) == 4  # curve, two matrices, forgetting


def test_shows_given_runs(tmp_path: Path):
    for seed in range(2):
        write_run(tmp_path / f"inflora_{seed}", seed=seed)
    write_run(tmp_path / "joint", method="joint")
    write_run(tmp_path / "half", finished=False)
    notebook = execute(RUNS=[str(tmp_path)])
    table, _ = outputs(notebook, "text/html")
    assert "±" in table
    assert "half is unfinished (no summary.json): left out." in printed(notebook)
    assert len(list(outputs(notebook, "image/png"))) == 4


def test_committed_as_it_ran_from_top_to_bottom():
    notebook: Any = nbformat.read(NOTEBOOK, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert len(list(outputs(notebook, "image/png"))) == 4
    assert not [output for cell in code for output in cell.outputs if output["output_type"] == "error"]
    assert all(f"{name}: {meaning}\n" in printed(notebook) for name, meaning in MEANINGS.items()), "run it again"


def test_committed_without_traces_of_the_machine_it_ran_on():
    assert not re.search(r"/(home|root|tmp|Users|work)/", NOTEBOOK.read_text(encoding="utf-8"))
