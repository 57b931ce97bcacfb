"""Has the CPU path become slower? Two commits side by side, and each beside itself, which is the noise.

Base: `--base`; else where this branch left origin/main; where that is this commit, or there is none: the commit
itself if the working tree differs from it, else its parent. Head is the working tree as it stands. Both are copied to a
folder of their own and csrc/ is built there in the same way; the cases (`bench.check.cases`) are head's.

Two processes per side take turns, case by case. A case is slower where the ratio of medians, head's over base's, is
beyond what a side shows against itself: the larger of its two ratios, plus MARGIN times their spread (bootstrap over
the rounds). What is beyond is measured again in new processes, and fails where it is beyond every time. No times are
stored and none are compared with another machine's. Exit status: 0 no case slower, 1 a case slower or broken.
"""

import argparse
import contextlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.base.checkout import ROOT
from bench.check.compare import check

CASES = Path(__file__).with_name("cases.py")


def git(*arguments: str, root: Path = ROOT, check: bool = True) -> str:
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
    if check and done.returncode:
        raise ValueError(f"git {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout.strip()


def default_base(root: Path = ROOT) -> str:
    """The commit to compare with, as the module's docstring says."""
    head, changed = git("rev-parse", "HEAD", root=root), bool(git("status", "--porcelain", root=root))
    left = git("merge-base", "HEAD", "origin/main", root=root, check=False)
    if left and left != head:
        return left
    return head if changed else git("rev-parse", "--verify", "HEAD~1", root=root)


def copy_working_tree(root: Path, to: Path) -> None:
    """What git tracks or would track, as it stands."""
    for name in git("ls-files", "-z", "-co", "--exclude-standard", root=root).split("\0"):
        source = root / name
        if name and source.is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, to / name)


def build_native(tree: Path) -> str:
    """Builds csrc/ inside the tree, as an install does; what is there to say about it."""
    if not (tree / "csrc").exists():
        return "has no csrc/"
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    if done.returncode or not list(tree.glob("fastheads/libfastheads*")):
        return f"csrc/ does not build: {(done.stderr.strip().splitlines() or ['?'])[-1][:200]}"
    return ""


@contextlib.contextmanager
def trees_of(base: str, root: Path = ROOT) -> Iterator[dict[str, Path]]:
    """Base in a git worktree, head as a copy of the working tree; gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        trees = {side: Path(folder).resolve() / side for side in ("base", "head")}
        git("worktree", "add", "--detach", str(trees["base"]), base, root=root)
        try:
            copy_working_tree(root, trees["head"])
            yield trees
        finally:
            git("worktree", "remove", "--force", str(trees["base"]), root=root)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.check", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", metavar="REV", help="compare with this commit")
    parser.add_argument("--rounds", type=int, default=15, help="samples per process and case")
    parser.add_argument("--minutes", type=float, default=3.5, help="after which nothing is measured again")
    given = parser.parse_args(argv)
    deadline = time.monotonic() + 60 * given.minutes
    try:
        base = git("rev-parse", "--verify", f"{given.base}^{{commit}}") if given.base else default_base()
    except ValueError as error:
        parser.error(f"no commit to compare with: {error}")
    head = git("rev-parse", "--short=10", "HEAD") + (" with changes" if git("status", "--porcelain") else "")
    print(f"base {base[:10]}, head {head}: {git('log', '-1', '--format=%s', base)!r} and what came since", flush=True)
    with trees_of(base) as trees:
        for side, tree in trees.items():
            if problem := build_native(tree):
                print(f"{side} {problem}")
        text, well = check(trees, CASES, deadline, rounds=given.rounds)
    print(text)
    print("No case is slower beyond the noise." if well else "Slower, or broken: see above.")
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
