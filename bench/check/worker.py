"""One tree's side of `bench.check`: a process that imports fastheads from that tree and runs cases when it is told to.

Reads JSON lines, `{"case": NAME, "calls": N}`, and answers each with one: `{"seconds": S}`, of one call in the mean of
N, or `{"missing": WHY}` where this tree cannot run the case. Standard library only: the cases import the rest.
"""

import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

PACKAGE = "fastheads"


def load(file: Path) -> ModuleType:
    """A module by its file; what it starts finds it by its name."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    sys.modules[file.stem] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def only_from(tree: Path) -> None:
    """From here on `import fastheads` finds that of `tree` and no other, `fastheads.kernels` being its kernels/."""
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(tree), *(p for p in sys.path if p not in ("", str(here)))]
    # An editable install of fastheads is a finder of its own: it would answer for what the tree does not have.
    sys.meta_path[:] = [f for f in sys.meta_path if "__editable__" not in getattr(f, "__module__", "")]
    load(here.parent / "base" / "checkout.py").find_kernels(tree)


def check_origin(tree: Path) -> None:
    """Raises ImportError where a module of fastheads came from somewhere else."""
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if name.split(".")[0] == PACKAGE and file and tree not in Path(file).resolve().parents:
            raise ImportError(f"{name} came from {file}, not from {tree}")


def sample(run: Callable[[], Any], calls: int) -> float:
    """Seconds of a call, in the mean over `calls`. A case that times itself returns its seconds."""
    started = time.perf_counter()
    own = [run() for _ in range(calls)]
    taken = time.perf_counter() - started
    return sum(own) / calls if isinstance(own[0], float) else taken / calls


def main() -> None:
    tree, file = (Path(a).resolve() for a in sys.argv[1:3])
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is no answer
    only_from(tree)
    cases = load(file).CASES
    name, run = "", None
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            if asked["case"] != name:
                name, run = "", cases[asked["case"]]()
                sample(run, 1)  # what only a first call does
                check_origin(tree)
                name = asked["case"]
            answer = {"seconds": sample(run, asked["calls"])}
        except Exception as error:
            first = (str(error).strip().splitlines() or [""])[0]
            answer = {"missing": f"{type(error).__name__}: {first[:300]}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
