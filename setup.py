"""Everything about the package; the tools (ruff, mypy, pytest) are set up in pyproject.toml."""

import re
from pathlib import Path

from setuptools import Extension, find_packages, setup

ROOT = Path(__file__).parent


def read_version() -> str:
    """`__version__` from fastheads/__init__.py, without importing it (that would need torch)."""
    text = (ROOT / "fastheads" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if match is None:
        raise RuntimeError('fastheads/__init__.py has no line `__version__ = "..."`')
    return match.group(1)


def read_readme() -> str:
    path = ROOT / "README.md"
    return path.read_text(encoding="utf-8") if path.exists() else ""


# A lower bound is what `make test-oldest` installs.
TRAIN = [
    "accelerate>=1.0",
    "torchvision>=0.26",
    "scikit-learn>=1.5",
    "matplotlib>=3.9",
    "rich>=14.2",
    "pillow>=10.3",
]
SWEEP = ["submitit>=1.5", 'tomli>=2; python_version < "3.11"']
# The fonts of the demo's icons, as files; and what reads outlines from them.
DEMO = [*TRAIN, "qtawesome==1.4.2", "fonttools>=4.50"]
BENCH = ["pytest-benchmark", "peft", 'xformers; platform_system == "Linux"', "pykeops"]
# setuptools: a test builds the package. pandas, webdataset: of OpenCLIP's training script.
TEST = [
    *SWEEP,
    "hypothesis",
    "import-linter",
    "pandas",
    "pytest",
    "pytest-xdist",
    "pytest-timeout",
    "pytest-benchmark",
    "setuptools>=64",
    "webdataset",
]
DEV = ["ruff", "mypy", "pre-commit", *TEST]
DOCS = ["mkdocs>=1.6", "mkdocs-material", "mkdocstrings-python", "ruff"]  # ruff sets signatures

# csrc/ is a plain shared library behind a C interface, loaded with ctypes: no headers of Python or torch. Optional:
# without a compiler the install goes on, and `explain` says so.
NATIVE = Extension(
    "fastheads.libfastheads",
    sources=["csrc/mmd.cpp"],
    depends=["csrc/mmd.h"],
    include_dirs=["csrc"],
    language="c++",
    # Without -fno-trapping-math gcc computes the exponentials one at a time: each could trap.
    extra_compile_args=["-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fopenmp"],
    extra_link_args=["-fopenmp"],
    optional=True,
    py_limited_api=True,  # nothing of Python is used: one library, and one wheel, for every version
)

setup(
    name="fastheads",
    version=read_version(),
    description="Per-head LoRA and gates for fine-tuning OpenCLIP to unseen domains",
    long_description=read_readme(),
    long_description_content_type="text/markdown",
    author="the fastheads authors",
    license="MIT",
    license_files=["LICENSE", "fastheads/demo/NOTICE"],
    python_requires=">=3.10",
    # kernels/ stands at the top of the repository and is installed as fastheads.kernels: a public
    # package called `kernels` exists, and must not be shadowed.
    packages=[
        *find_packages(include=["fastheads", "fastheads.*"]),
        "fastheads.kernels",
        *(f"fastheads.kernels.{name}" for name in find_packages("kernels")),
    ],
    package_dir={"fastheads.kernels": "kernels"},
    package_data={"": ["*.json", "*.html", "*.css", "*.gz", "*.safetensors", "NOTICE", "py.typed"]},
    include_package_data=False,
    ext_modules=[NATIVE],
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
    install_requires=[
        "torch>=2.11",
        'triton>=3.6; platform_system == "Linux"',
        "open_clip_torch>=3.3",
        "timm>=1.0.28",
        "safetensors>=0.4.3",
        "numpy>=1.26",
    ],
    extras_require={
        "hf": ["transformers>=5.16"],
        "tensorboard": ["tensorboard"],
        "train": TRAIN,
        "sweep": SWEEP,
        "demo": DEMO,
        "bench": BENCH,
        "test": TEST,
        "dev": DEV,
        "docs": DOCS,
    },
    entry_points={"console_scripts": ["fastheads = fastheads.cli:main"]},
    zip_safe=False,
    classifiers=[
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
