"""The comparison of marked cells: what changes is found, and only what is marked."""

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


@pytest.fixture
def compared(executed, tmp_path, request):
    """Compares `executed` as a test has changed it."""

    def compare() -> tuple[int, list[str]]:
        nbformat.write(executed, tmp_path / "run.ipynb")
        return differences(SOURCE, tmp_path / "run.ipynb", request.session)

    return compare


def marks(notebook) -> list:
    tag = "nbval-check-output"
    return [c for c in notebook.cells if tag in c.metadata.get("tags", [])]


def test_an_equal_run_differs_nowhere_and_an_unmarked_cell_may_change(
    executed, compared
):
    assert len(marks(executed)) >= 3
    with_outputs = [c for c in executed.cells if c.get("outputs")]
    cell = next(c for c in with_outputs if c not in marks(executed))
    cell.outputs = [nbformat.v4.new_output("stream", text="another machine\n")]
    assert compared() == (len(marks(executed)), [])


def test_a_changed_an_added_and_a_missing_output_are_found(executed, compared):
    more = nbformat.v4.new_output("display_data", {"text/plain": "more"})
    for cell in marks(executed):
        (output,) = cell.outputs
        changed = {**output, "text": output.text[:-2] + "#" + output.text[-1]}
        for outputs in ([nbformat.from_dict(changed)], [output, more], []):
            cell.outputs = outputs
            _, (report,) = compared()
            assert "code cell" in report
        cell.outputs = [output]


def test_a_run_of_other_cells_or_one_that_stopped_is_no_run(executed, compared):
    code = [cell for cell in executed.cells if cell.cell_type == "code"]
    count, code[-1].execution_count = code[-1].execution_count, None
    with pytest.raises(ValueError, match="no complete run of .*02_data_prep"):
        compared()
    code[-1].execution_count = count
    marks(executed)[0].source += "\nprint()"
    with pytest.raises(ValueError, match="no complete run of .*02_data_prep"):
        compared()
