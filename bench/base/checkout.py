"""Makes `fastheads.kernels` the kernels/ of this checkout, also where the checkout was never installed.

setup.py maps the folder to that name; on a machine where the repository was only copied, nobody has. And where another
checkout is installed beside, its kernels must not answer for this one's. Also a pytest plugin:
`-p bench.base.checkout`.
"""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def find_kernels() -> None:
    """Registers kernels/ as `fastheads.kernels`, unless it is that already."""
    import fastheads

    folder = ROOT / "kernels"
    found = importlib.util.find_spec("fastheads.kernels")
    if found is not None and found.origin is not None and Path(found.origin).resolve().parent == folder:
        return
    if ROOT not in Path(fastheads.__file__).resolve().parents:
        return  # an installed fastheads, which has its own kernels
    spec = importlib.util.spec_from_file_location(
        "fastheads.kernels", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fastheads.kernels"] = module
    spec.loader.exec_module(module)
    fastheads.kernels = module


find_kernels()
