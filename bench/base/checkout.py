"""Makes `fastheads.kernels` the kernels/ of this checkout, also where the checkout was never installed.

setup.py maps the folder to that name; on a machine where the repository was only copied, nobody has. And where another
checkout is installed beside, its kernels must not answer for this one's. Whatever imports `bench` has it. Standard
library only: `bench.check` uses it in trees that have no bench/.
"""

import importlib.util
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


class Kernels:
    """Finds `fastheads.kernels` in a tree, for the fastheads of that tree."""

    def __init__(self, tree: Path) -> None:
        self.tree = tree

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        file = self.tree / "kernels" / "__init__.py"
        own = name == "fastheads.kernels" and self.tree / "fastheads" in (Path(p).resolve() for p in path)
        if not own or not file.exists():
            return None
        return importlib.util.spec_from_file_location(name, file, submodule_search_locations=[str(file.parent)])


def find_kernels(tree: Path = ROOT) -> None:
    if not any(isinstance(finder, Kernels) and finder.tree == tree for finder in sys.meta_path):
        sys.meta_path.insert(0, Kernels(tree))


find_kernels()
