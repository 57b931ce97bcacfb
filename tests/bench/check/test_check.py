"""The regression guard: what it must catch, what it must let pass, and where its two trees come from."""

import subprocess
from pathlib import Path

import pytest

from bench.check.__main__ import copy_working_tree, default_base, trees_of
from bench.check.compare import Result, check

CASES = """
def work():
    import fastheads

    return fastheads.work

def young():
    import fastheads

    return fastheads.young

CASES = {"work": work, "young": young}
"""
# Loops of about a millisecond, so that a round is short and a factor of two is far beyond a busy machine's noise.
SOURCE = "def work():\n    return sum(range({n}))\n"
YOUNG = "def young():\n    return sum(range(20_000))\n"


def tree(folder: Path, source: str) -> Path:
    (folder / "fastheads").mkdir(parents=True)
    (folder / "fastheads" / "__init__.py").write_text(source)
    return folder


def verdict(tmp_path: Path, base: str, head: str) -> tuple[str, bool]:
    cases = tmp_path / "cases.py"
    cases.write_text(CASES)
    trees = {"base": tree(tmp_path / "base", base), "head": tree(tmp_path / "head", head)}
    return check(trees, cases, rounds=9, sample_seconds=0.004)


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    return subprocess.run(
        ["git", *who, *arguments], cwd=folder, check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.fixture
def repository(tmp_path):
    """Two commits on main; file: "one", then "two"."""
    root = tmp_path / "repository"
    root.mkdir()
    git(root, "init", "-q", "-b", "main")
    for text in ("one", "two"):
        (root / "file").write_text(text)
        git(root, "add", "file")
        git(root, "commit", "-q", "-m", text)
    return root


def test_a_slowdown_is_caught(tmp_path):
    text, well = verdict(tmp_path, SOURCE.format(n=20_000) + YOUNG, SOURCE.format(n=200_000) + YOUNG)
    assert not well
    assert "work: head takes" in text and "young: head takes" not in text


def test_no_change_passes(tmp_path):
    source = SOURCE.format(n=20_000) + YOUNG
    text, well = verdict(tmp_path, source, source)
    assert well, text


def test_a_case_that_the_base_lacks_is_named_and_does_not_fail(tmp_path):
    text, well = verdict(tmp_path, SOURCE.format(n=20_000), SOURCE.format(n=20_000) + YOUNG)
    assert well, text
    assert "young: base cannot run it: AttributeError" in text


def test_a_case_that_only_the_base_can_run_fails(tmp_path):
    text, well = verdict(tmp_path, SOURCE.format(n=20_000) + YOUNG, SOURCE.format(n=20_000))
    assert not well
    assert "young: head cannot run it: AttributeError" in text and "broken" in text


def test_a_tree_that_ends_the_process_is_named(tmp_path):
    text, _ = verdict(tmp_path, "import os\nos._exit(3)\n", SOURCE.format(n=20_000) + YOUNG)
    assert "work: base cannot run it: the process ended" in text


def test_fastheads_of_another_tree_is_refused(tmp_path):
    """This environment has fastheads installed: a tree without one must not be answered with that."""
    cases = tmp_path / "cases.py"
    cases.write_text(CASES)
    (tmp_path / "empty").mkdir()
    trees = {"base": tmp_path / "empty", "head": tmp_path / "empty"}
    text, _ = check(trees, cases, rounds=2, sample_seconds=0.001)
    assert text.count("No module named 'fastheads'") == 4


def quiet(size: float, shift: int = 0) -> list[float]:
    """Spread over a thousandth."""
    return [size * (1 + 0.0005 * ((i + shift) % 3)) for i in range(9)]


def test_the_bound_is_the_noise_that_was_measured():
    def found(head: float, again: float) -> Result:
        samples = {"base": quiet(1), "base again": quiet(1, 1), "head": quiet(head)}
        return Result("", {**samples, "head again": quiet(head * again, 1)})

    assert found(1.03, 1.0).slower()
    assert not found(1.03, 1.08).slower()  # head's own two processes are further apart than the commits
    assert not found(0.8, 1.0).slower()
    assert 1.08 < found(1.03, 1.08).noise() < 1.1


def test_base_is_where_the_branch_left_main_else_the_parent(repository):
    head, parent = git(repository, "rev-parse", "HEAD"), git(repository, "rev-parse", "HEAD~1")
    assert default_base(repository) == parent
    (repository / "file").write_text("three")
    assert default_base(repository) == head
    git(repository, "update-ref", "refs/remotes/origin/main", parent)
    assert default_base(repository) == parent


def test_base_is_the_commit_and_head_the_working_tree(repository):
    (repository / "file").write_text("three")
    (repository / "new").write_text("not yet added")
    (repository / ".gitignore").write_text("built\n")
    (repository / "built").write_text("of another machine")
    with trees_of("HEAD~1", repository) as trees:
        assert (trees["base"] / "file").read_text() == "one"
        assert (trees["head"] / "file").read_text() == "three"
        assert (trees["head"] / "new").exists() and not (trees["head"] / "built").exists()
    assert not trees["base"].exists()
    assert len(git(repository, "worktree", "list").splitlines()) == 1


def test_a_file_that_was_deleted_is_not_copied(repository, tmp_path):
    (repository / "file").unlink()
    copy_working_tree(repository, tmp_path / "to")
    assert not (tmp_path / "to" / "file").exists()
