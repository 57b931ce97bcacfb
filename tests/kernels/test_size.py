"""A kernel is read on one screen and started with few arguments: every kernel that a launcher launches."""

import ast
from pathlib import Path

import pytest

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
LINES, ARGUMENTS = 60, 25


def jitted() -> dict[str, ast.FunctionDef]:
    """Every function of kernels/ under @triton.jit: kernels, and what is inlined into them."""
    found = {}
    for file in sorted(KERNELS.glob("*.py")):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.FunctionDef) and "triton.jit" in map(ast.unparse, node.decorator_list):
                found[f"{file.name}: {node.name}"] = node
    return found


FUNCTIONS = jitted()


def test_the_kernels_are_found():
    kernels = {name.split(": ")[1] for name in FUNCTIONS if name.endswith("_kernel")}
    assert kernels >= {"attention_fwd_kernel", "attention_bwd_kernel", "one_pass_fwd_kernel", "fold_kernel"}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_kernel_is_longer_than_a_screen_or_takes_more_than_25_arguments(name):
    function = FUNCTIONS[name]
    given = function.args
    assert len(given.posonlyargs + given.args + given.kwonlyargs) <= ARGUMENTS and not (given.vararg or given.kwarg)
    assert function.end_lineno - function.lineno + 1 <= LINES


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name.endswith("_kernel")])
def test_a_kernel_says_what_it_computes(name):
    assert ast.get_docstring(FUNCTIONS[name])
