"""The comparison of marked cells: what changes is found, and only what is marked."""

import copy
from pathlib import Path

import nbformat
import pytest
from marked import differences

SOURCE = Path(__file__).parents[2] / "notebooks" / "02_data_prep.ipynb"


@pytest.fixture
def executed():
    """A committed notebook as papermill would leave it after an equal run."""
    notebook = nbformat.read(SOURCE, 4)
    injected = nbformat.v4.new_code_cell("seed = 0", execution_count=2)
    injected.metadata["tags"] = ["injected-parameters"]
    notebook.cells.insert(2, injected)
    return notebook


def marks(notebook) -> list:
    return [c for c in notebook.cells if "# NBVAL_CHECK_OUTPUT" in c.source]


def compared(notebook, folder: Path, session) -> tuple[int, list[str]]:
    nbformat.write(notebook, folder / "run.ipynb")
    return differences(SOURCE, folder / "run.ipynb", session)


def test_an_equal_run_differs_nowhere(executed, tmp_path, request):
    assert len(marks(executed)) >= 3
    assert compared(executed, tmp_path, request.session) == (len(marks(executed)), [])


def test_a_changed_character_in_any_marked_output_is_found(executed, tmp_path, request):
    for index in range(len(marks(executed))):
        doctored = copy.deepcopy(executed)
        (output,) = marks(doctored)[index].outputs
        output.text = output.text[:-2] + "#" + output.text[-1]
        _, (report,) = compared(doctored, tmp_path, request.session)
        assert "code cell" in report and "#" in report


def test_a_missing_and_an_added_output_are_found(executed, tmp_path, request):
    less, more = copy.deepcopy(executed), copy.deepcopy(executed)
    marks(less)[0].outputs = []
    extra = nbformat.v4.new_output("display_data", {"text/plain": "more"})
    marks(more)[0].outputs.append(extra)
    for doctored in (less, more):
        _, reports = compared(doctored, tmp_path, request.session)
        assert len(reports) == 1


def test_a_cell_without_the_mark_may_change(executed, tmp_path, request):
    cell = next(
        c for c in executed.cells if c.get("outputs") and c not in marks(executed)
    )
    cell.outputs = [nbformat.v4.new_output("stream", text="another machine\n")]
    assert compared(executed, tmp_path, request.session)[1] == []


def test_a_run_that_stopped_or_ran_other_cells_is_no_run(executed, tmp_path, request):
    stopped, other = copy.deepcopy(executed), copy.deepcopy(executed)
    [c for c in stopped.cells if c.cell_type == "code"][-1].execution_count = None
    marks(other)[0].source += "\nprint()"
    for doctored in (stopped, other):
        with pytest.raises(ValueError, match="no complete run of .*02_data_prep"):
            compared(doctored, tmp_path, request.session)
