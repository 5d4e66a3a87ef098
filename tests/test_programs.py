import sys

import pytest

from e2e_utils.programs import run_program


def test_what_a_program_prints_comes_back(tmp_path):
    code = "import os; print(os.environ['COLOUR'], os.getcwd())"
    said = run_program(sys.executable, "-c", code, folder=tmp_path, COLOUR="red")
    assert said == f"red {tmp_path.resolve()}"
    with pytest.raises(RuntimeError, match="^no such folder is no folder$"):
        run_program(sys.executable, "-c", code, folder="no such folder")


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (
            (sys.executable, "-c", "import sys; sys.exit('no tiles')"),
            "with 1: no tiles",
        ),
        (("no such program",), "no such program is not installed"),
        (
            (sys.executable, "-c", "import time; time.sleep(9)"),
            "took longer than 0.2 s",
        ),
    ],
)
def test_a_program_that_fails_stops_with_its_reason(command, said):
    with pytest.raises(RuntimeError, match=said):
        run_program(*command, seconds=0.2 if "sleep" in command[-1] else 20)
