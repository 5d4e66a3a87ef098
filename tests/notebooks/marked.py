"""Cells with the tag nbval-check-output, committed and as another run left them.

nbval would execute a notebook in order to compare it. Here papermill has executed it
already: nbval finds the marks and compares the outputs, and starts no kernel.
"""

from pathlib import Path

import nbformat
import pytest
from nbval.plugin import IPyNbFile, coalesce_streams


def differences(
    committed: Path, executed: Path, session: pytest.Session
) -> tuple[int, list[str]]:
    """Compare the marked cells of a notebook with a run of it.

    Args:
        committed: the notebook with the outputs that are right.
        executed: the same notebook as papermill wrote it.
        session: pytest's, which nbval asks for its options.

    Returns:
        How many cells are marked, and what differs: nbval's report for each such cell.

    Raises:
        ValueError: `executed` is no complete run of the same cells.
    """
    reference = IPyNbFile.from_parent(session, path=committed)
    reference.compare_outputs = False  # as --nbval-lax: marked cells alone
    reference.setup_sanitize_files()
    cells = list(reference.collect())
    fresh = [cell for cell in nbformat.read(executed, 4).cells if written(cell)]
    same = [cell.cell.source for cell in cells] == [cell.source for cell in fresh]
    if not same or any(cell.execution_count is None for cell in fresh):
        raise ValueError(f"{executed} is no complete run of {committed}")
    marked, found = 0, []
    for cell, run in zip(cells, fresh, strict=True):
        if not cell.options["check"]:
            continue
        marked += 1
        ours, theirs = map(coalesce_streams, (run.outputs, cell.cell.outputs))
        if not cell.compare_outputs(ours, theirs):
            report = "\n".join(cell.comparison_traceback)
            found.append(f"{committed.name}, code cell {cell.cell_num}:\n{report}")
    return marked, found


def written(cell: nbformat.NotebookNode) -> bool:
    """Whether a cell is code of the author, not the parameters that papermill adds."""
    tags = cell.metadata.get("tags", [])
    return cell.cell_type == "code" and "injected-parameters" not in tags
