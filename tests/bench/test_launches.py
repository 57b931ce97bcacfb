"""`bench.launches`, and with it the guard: how many device operations a layer has, exactly, by form.

Who lowers a number writes the new one here; a number that has grown is a launch that a small batch pays for.
"""

import json
from dataclasses import replace

import pytest
import torch
from standalone import without_interpreter

from bench import launches
from bench.base.results import read
from bench.base.towers import SETTINGS
from bench.launches import TINY, Layer, operations

AMP = Layer("", SETTINGS["B/16"], 64)
FP32 = replace(AMP, setting=SETTINGS["B/32"], autocast=False)
CASES = {
    "bf16 autocast": AMP,
    "float32": FP32,
    "bf16 weights": replace(AMP, autocast=False, stored=torch.bfloat16),
    "bf16 autocast, nothing captured": replace(AMP, captured=False),
    "bf16 autocast, no gate": replace(AMP, gate=None),
    "bf16 autocast, gates alone": replace(AMP, rank=0),
}
# Device operations forward and backward, out-projection and gate included; among them our launches, with arguments.
STOCK = {"bf16 autocast": (10, 20), "float32": (5, 19), "bf16 weights": (5, 19)}
OPERATIONS = {
    ("stacked", "bf16 autocast"): (5, 7),
    ("delta", "bf16 autocast"): (5, 7),
    ("one_pass", "bf16 autocast"): (4, 8),
    ("stacked", "float32"): (4, 7),
    ("delta", "float32"): (4, 7),
    ("one_pass", "float32"): (2, 8),
    ("stacked", "bf16 weights"): (4, 7),
    ("delta", "bf16 weights"): (4, 7),
    ("one_pass", "bf16 weights"): (3, 8),
    ("stacked", "bf16 autocast, nothing captured"): (5, 7),
    ("delta", "bf16 autocast, nothing captured"): (5, 7),
    ("one_pass", "bf16 autocast, nothing captured"): (4, 8),
    ("stacked", "bf16 autocast, no gate"): (5, 7),
    ("delta", "bf16 autocast, no gate"): (5, 7),
    ("one_pass", "bf16 autocast, no gate"): (4, 8),
    ("stacked", "bf16 autocast, gates alone"): (5, 5),
    ("delta", "bf16 autocast, gates alone"): (5, 5),
    ("one_pass", "bf16 autocast, gates alone"): (4, 6),
}
FOLD, SUMS = "fold_kernel(17)", "sums_kernel(8)"
BACKWARD = "attention_bwd_at_once_kernel(16)", "low_rank_bwd_kernel(16)", SUMS
ON_CHIP = "attention_bwd_at_once_kernel(20)", *BACKWARD[1:]
ARGUMENTS = {
    "stacked": ([FOLD, "attention_fwd_kernel(14)"], [FOLD, *BACKWARD]),
    "delta": ([FOLD, "attention_fwd_kernel(18)"], [FOLD, *ON_CHIP]),
    "one_pass": ([FOLD, "one_pass_fwd_kernel(23)"], [FOLD, *ON_CHIP]),
}


def counted(form, case):
    return operations(replace(CASES[case], form=form))


def ours(seen):
    return [name for name in seen if name.endswith(")")]


@pytest.mark.parametrize(("form", "case"), OPERATIONS)
def test_a_layer_has_so_many_device_operations(form, case):
    forward, backward = counted(form, case)
    assert (len(forward), len(backward)) == OPERATIONS[form, case], f"{forward}, {backward}"


@pytest.mark.parametrize("form", ARGUMENTS)
def test_its_launches_have_so_many_arguments(form):
    forward, backward = counted(form, "bf16 autocast")
    assert (ours(forward), ours(backward)) == ARGUMENTS[form]


@pytest.mark.parametrize("case", STOCK)
def test_stock_has_so_many(case):
    assert tuple(map(len, counted("stock", case))) == STOCK[case]


@pytest.mark.parametrize("form", ("stock", *launches.FORMS))
def test_what_is_not_computed_is_counted_as_if_it_were(form):
    layer = Layer(form, TINY, 2)
    assert operations(layer) == operations(layer, computing=True)


def test_several_kernels_of_one_operation_and_waits_for_the_gpu_count():
    x = torch.ones(2, 3, requires_grad=True)
    seen = launches.Operations(computing=True)
    with seen:
        y = torch.nn.functional.pad(x, (0, 1))[0]
        y.sum().item()
    assert seen.seen == ["fill_", "copy_", "sum", "_local_scalar_dense"]


def test_a_form_that_refuses_a_shape_says_so():
    (row,) = launches.counted([replace(AMP, form="one_pass", autocast=False)])
    assert row.status == "not run" and "keys and values on chip" in row.why


def test_a_result_is_read_again(tmp_path, capsys):
    rows = launches.counted([Layer("stock", TINY, 1), Layer("stacked", TINY, 1)])
    launches.write(tmp_path / "launches.json", launches.environment("cpu"), rows)
    launches.main(["--from", str(tmp_path / "launches.json")])
    assert "| stacked |" in capsys.readouterr().out and read(tmp_path / "launches.json")[1] == rows


@pytest.mark.slow
def test_host_times_are_of_every_form_and_way():
    ask = "import json; from bench.launches import host_times; print(json.dumps(host_times(False, 1)))"
    done = without_interpreter("-c", ask, timeout=600)
    assert done.returncode == 0, done.stderr
    times = json.loads(done.stdout)
    assert list(times) == ["stock", *(f"{form}, {way}" for form in launches.FORMS for way in launches.WAYS)]
    assert all(took["median"] > 0 for took in times.values())
