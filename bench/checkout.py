"""Makes `fastheads.kernels` importable from a checkout that was never installed.

setup.py maps the folder kernels/ to that name; on a machine where the repository was only copied, nobody has. Also a
pytest plugin: `pytest -p bench.checkout`.
"""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def find_kernels() -> None:
    """Registers kernels/ as `fastheads.kernels`, unless it is that already."""
    import fastheads

    if importlib.util.find_spec("fastheads.kernels") is not None:
        return
    folder = ROOT / "kernels"
    spec = importlib.util.spec_from_file_location(
        "fastheads.kernels", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fastheads.kernels"] = module
    spec.loader.exec_module(module)
    fastheads.kernels = module


find_kernels()
