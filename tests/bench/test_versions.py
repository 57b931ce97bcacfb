"""The table of versions says what pytest said."""

import subprocess
import sys

from bench import versions
from bench.base.results import read_json
from bench.base.tables import read_block

TESTS = """
import pytest

def test_right(): pass
def test_wrong(): assert False
def test_left_out(): pytest.skip("why")
@pytest.mark.xfail
def test_expected(): assert False
@pytest.fixture
def broken(): raise RuntimeError
def test_error(broken): pass
@pytest.fixture
def breaks_afterwards():
    yield
    raise RuntimeError
def test_late(breaks_afterwards): pass
"""


def test_a_run_is_counted_as_pytest_ended_it(tmp_path, capsys):
    (tmp_path / "test_some.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--junitxml=report.xml", "test_some.py"]
    subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=120)
    file, doc = tmp_path / "versions.json", tmp_path / "page.md"
    doc.write_text("<!-- versions -->\n<!-- end -->\n")
    for name in ("oldest", "latest", "oldest"):
        versions.main([name, str(tmp_path / "report.xml"), "--json", str(file), "--doc", str(doc)])
    found = read_json(file)["rows"]
    assert sorted(run["name"] for run in found) == ["latest", "oldest"]
    for run in found:
        assert (run["passed"], run["skipped"]) == (1, 2)
        assert run["failed"] == [f"test_some.test_{name}" for name in ("wrong", "error", "late")]
    assert read_block(doc.read_text(), "versions") == f"{versions.page(found)}\n"
