"""What an installation promises: light to import, nothing foreign in site-packages, one version."""

import importlib.metadata
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]

# Five processes forked from one that has imported torch: in each, the processor time (user + system
# + children) of the import statement alone. That is what `import fastheads` adds: modules of
# torch that it loads and `import torch` doesn't are in it; torch's own seconds, whose scatter is
# larger than the limit, are not, nor is time spent waiting for others on a busy machine.
MEASURE_IMPORT = """
import os, resource

def cpu_seconds():
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)

import torch
for _ in range(5):
    if os.fork() == 0:
        start = cpu_seconds()
        import fastheads
        print(cpu_seconds() - start, flush=True)
        os._exit(0)
    os.wait()
"""

LIST_MODULES = """
import json, sys
import torch
torch_only = sorted(sys.modules)
import fastheads
print(json.dumps([torch_only, sorted(sys.modules)]))
"""

# -I: neither the working directory nor PYTHONPATH is searched, only what is installed.
FIND_KERNELS = """
import importlib.util
spec = importlib.util.find_spec("kernels")
print(spec and spec.origin)
"""


def run_python(code: str, cwd: Path, *options: str) -> str:
    command = [sys.executable, *options, "-c", code]
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_import_adds_less_than_300_ms_to_torch(tmp_path):
    # The median: the first process may still have to compile .pyc files.
    seconds = [float(line) for line in run_python(MEASURE_IMPORT, tmp_path).split()]
    assert len(seconds) == 5
    assert statistics.median(seconds) < 0.3, seconds


def test_import_loads_no_optional_library(tmp_path):
    torch_only, with_fastheads = map(set, json.loads(run_python(LIST_MODULES, tmp_path)))
    assert "triton" not in with_fastheads
    assert {"open_clip", "torchvision"} & (with_fastheads - torch_only) == set()


def test_kernels_are_the_folder_at_the_top_of_the_repository():
    import fastheads.kernels

    assert Path(fastheads.kernels.__file__).resolve() == ROOT / "kernels" / "__init__.py"


def test_no_module_called_kernels_is_installed(tmp_path):
    # The public package of that name may be there: what is found must be its, not ours.
    origin = run_python(FIND_KERNELS, tmp_path, "-I")
    owners = importlib.metadata.packages_distributions().get("kernels", [])
    assert "fastheads" not in owners
    assert origin == "None" or (owners and ROOT not in Path(origin).resolve().parents)


def test_a_plain_install_holds_kernels_and_package_data(tmp_path):
    folders = ["--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp")]
    build = [sys.executable, "setup.py", "--quiet", "build", *folders]  # the native library too
    result = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr

    assert [path.name for path in (tmp_path / "lib").iterdir()] == ["fastheads"]
    for source, installed in [("fastheads", "fastheads"), ("kernels", "fastheads/kernels")]:
        for path in (ROOT / source).rglob("*"):
            target = tmp_path / "lib" / installed / path.relative_to(ROOT / source)
            if path.is_file() and "__pycache__" not in path.parts:
                assert target.is_file(), f"{path.relative_to(ROOT)} is not installed"


def test_what_is_imported_has_a_lower_bound():
    """Else `make test-oldest` takes the first version ever released, or whichever another package asks for."""
    for asked in map(Requirement, importlib.metadata.requires("fastheads")):
        used = asked.marker is None or any(asked.marker.evaluate({"extra": e}) for e in ("", "demo", "hf", "sweep"))
        assert not used or {bound.operator for bound in asked.specifier} & {">=", "=="}, str(asked)


def test_one_version():
    import fastheads

    assert fastheads.__version__ == importlib.metadata.version("fastheads")
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", fastheads.__version__)
