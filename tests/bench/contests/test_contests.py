"""Contests: ours is never wrong, what is wrong is found, what cannot run says why; the numbers are what they say."""

import importlib.util
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from standalone import clean_environment

from bench.base import results
from bench.base.towers import SETTINGS
from bench.conftest import Contests
from bench.contests import bench_attention, bench_block, bench_hosts, bench_inference, bench_mmd, bench_model_step
from bench.contests.attentions import EXACT, PLAIN, LoraQKVO, adapters, modules
from bench.contests.contenders.towers import IMPLEMENTATIONS, training
from bench.contests.contest import Contender, Group, NotRunError, Trial
from bench.contests.models import Clip, blocks_of, clip
from bench.contests.vision import VisionCase

ROOT = Path(__file__).resolve().parents[3]
MODULES = (bench_attention, bench_block, bench_hosts, bench_model_step, bench_mmd, bench_inference)
GROUPS = {m.GROUP.name: m.GROUP for m in MODULES}
BLOCK = VisionCase("block", "tiny", 2, "cpu", "fp32", (4,))
INTERPRETED = {"stacked", "delta", "one_pass"}
RECOMPUTED = {"stacked, recompute", "delta, recompute"}  # seconds each; tests/ops has them


def rehearsals(group: Group, keep) -> list:
    """Pairs of a tiny case and a contender."""
    return [(case, c) for case in group.cases("cpu", "rehearsal") for c in group.of(case) if keep(c)]


def cheap(name: str, contender: Contender) -> bool:
    """All of ours; of a whole tower, the kernels' interpreter is left to the block."""
    slow = RECOMPUTED | (INTERPRETED if name == "model step" else set())
    return contender.ours and contender.name not in slow


OURS = [(n, *pair) for n, group in GROUPS.items() for pair in rehearsals(group, lambda c, n=n: cheap(n, c))]


@pytest.mark.parametrize(("name", "case", "contender"), OURS, ids=[f"{n}: {k.name}: {c.name}" for n, k, c in OURS])
def test_ours_is_right(name, case, contender):
    if contender.why_not(case).endswith(" is not installed"):
        pytest.skip(contender.why_not(case))
    verdict = GROUPS[name].check(contender, case)
    assert verdict.status == "ok", verdict.why


def test_every_implementation_is_among_ours():
    block = {c.name for n, _, c in OURS if n == "block"}
    assert set(IMPLEMENTATIONS) <= block
    assert {"triton", "cpu", "reference"} <= {c.name for n, _, c in OURS if n == "attention"}
    assert {"auto", "triton", "cpu", "reference"} <= {c.name for n, _, c in OURS if n == "mmd"}


@pytest.mark.parametrize("name", ["stock", "full", "plain", "factored", "merged"])
def test_peers_written_from_their_definition_are_right(name):
    verdict = GROUPS["block"].check(GROUPS["block"].named(name), BLOCK)
    assert verdict.status == "ok", verdict.why


@pytest.mark.parametrize("maths", [m for m in PLAIN if m != "full"])
@pytest.mark.parametrize("kinds", [PLAIN, EXACT], ids=["plain", "exact"])
def test_the_standards_are_their_mathematics(maths, kinds):
    """In float64, against weights into which the deltas are multiplied and gates that scale out_proj's columns."""
    model = BLOCK.model().double()
    block = blocks_of(model)[0]
    D, H = block.attn.embed_dim, block.attn.num_heads
    values = {n: v.double() for n, v in adapters(maths, D, H, 4, 0).items()}
    w_in, w_out = block.attn.in_proj_weight.clone(), block.attn.out_proj.weight.clone()
    if maths == "ha-lora":
        for t, part in enumerate((0, 2)):
            delta = torch.cat([b @ a for a, b in zip(values["lora_A"][t], values["lora_B"][t], strict=True)])
            w_in[part * D : (part + 1) * D] += delta
        gate = H * values["theta"].softmax(0)
        w_out *= gate.repeat_interleave(D // H)
    elif maths == "lora qv":
        for t, part in enumerate((0, 2)):
            w_in[part * D : (part + 1) * D] += values["lora_B"][t] @ values["lora_A"][t]
    elif maths == "lora qkvo":
        w_in += values["in_B"] @ values["in_A"]
        w_out += values["out_B"] @ values["out_A"]
    x = torch.randn(2, 5, D, dtype=torch.float64)
    found = modules(kinds[maths])(BLOCK.model().double(), (4,))
    with torch.no_grad():
        got = blocks_of(found)[0].attn(x, x, x)[0]
        block.attn.in_proj_weight.copy_(w_in)
        block.attn.out_proj.weight.copy_(w_out)
        assert float((got - block.attn(x, x, x)[0]).abs().max()) < 1e-12


# ----------------------------------------------------------------------------------------------- what is wrong, or not


def tampered(contender: Contender, name: str, factor: float, **options) -> Contender:
    """The same, one of its outputs a little off."""

    def spoiled(case) -> Trial:
        made = contender.build(case)
        return replace(made, outputs=lambda: {n: v * factor if n == name else v for n, v in made.outputs().items()})

    return replace(contender, build=spoiled, **options)


@pytest.mark.parametrize("name", ["y", "dx", "dlora_A", "dtheta"])
def test_a_contender_that_is_wrong_is_said_to_be(name):
    wrong = tampered(GROUPS["block"].named("plain"), name, 1.001, fault="it was spoiled")
    verdict = GROUPS["block"].check(wrong, BLOCK)
    assert verdict.status == "wrong"
    assert verdict.why.startswith(f"{name} is off by 0.001") and verdict.why.endswith("it was spoiled")
    assert verdict.error > verdict.allowed


def test_what_is_not_finite_is_wrong():
    verdict = GROUPS["block"].check(tampered(GROUPS["block"].named("plain"), "dx", float("nan")), BLOCK)
    assert verdict.status == "wrong" and verdict.error == float("inf")


def test_an_output_that_is_not_given_is_an_error():
    missing = replace(GROUPS["block"].named("plain"), build=GROUPS["block"].named("stock").build)
    with pytest.raises(ValueError, match="gives no dlora_A, dlora_B, dtheta"):
        GROUPS["block"].check(missing, BLOCK)


@pytest.mark.parametrize(("name", "package"), [("peft", "peft"), ("xformers", "xformers")])
def test_a_missing_library_is_not_run(name, package, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == package else found(n, *a))
    with pytest.raises(NotRunError, match=f"^{package} is not installed$"):
        GROUPS["block"].named(name).tried(BLOCK)


def test_a_peer_that_breaks_is_not_run_and_ours_is_an_error():
    def broken(case):
        raise RuntimeError("no such kernel\nand more")

    with pytest.raises(NotRunError, match="^broke: RuntimeError: no such kernel$"):
        Contender("peer", "", broken).tried(BLOCK)
    with pytest.raises(RuntimeError):
        Contender("ours", "", broken, ours=True).tried(BLOCK)


@pytest.mark.parametrize("name", ["peft", "peft, merged"])
def test_peft_doubles_the_delta_of_out_proj(name):
    """And that is all that is wrong with it: with that delta twice, the documented mathematics gives its numbers."""
    pytest.importorskip("peft")
    group = GROUPS["inference"]
    case = VisionCase("inference", "tiny", 2, "cpu", "fp32", (4, 4))
    verdict = group.check(group.named(name), case)
    assert verdict.status == "wrong" and "PEFT adds out_proj's delta twice" in verdict.why

    doubled = modules(LoraQKVO)(case.model(), case.ranks)
    for block in blocks_of(doubled):
        block.attn.out_B.data.mul_(2)
    with torch.no_grad():
        images = case.tensor(2, 3, case.of.image, case.of.image, stream=0, dtype=torch.float32)
        right = doubled.eval().visual(images)
    got = group.named(name).build(case).outputs()["features"]
    assert float((got - right).abs().max()) < 1e-5 * float(right.abs().max())


def test_clip_loras_gradient_comes_from_the_base_weight():
    """dx is what a frozen attention gives for the gradient of q and v."""
    verdict = GROUPS["block"].check(GROUPS["block"].named("clip-lora"), BLOCK)
    assert verdict.status == "wrong" and verdict.why.startswith("dx is off")
    assert "; so are" not in verdict.why


# ------------------------------------------------------------------------------------------------ what is measured


def test_the_peak_on_a_cpu_is_the_most_that_was_held_at_once():
    def run():
        first = torch.zeros(1_000_000)  # 4 MB
        second = first + 1
        del first
        return second.sum()

    made = Trial(run, dict)
    peak = made.memory("cpu")["peak_bytes"]
    assert 8_000_000 <= peak < 8_001_000


def test_saved_bytes_leave_out_what_exists_anyway():
    x = torch.zeros(1000, requires_grad=True)
    made = Trial(lambda: None, dict, lambda: (x * 2).square().sum(), lambda: (x,))
    assert made.memory("cpu")["saved_bytes"] == 4000


def test_recompute_saves_less_than_stock():
    saved = {n: training(n).trial(BLOCK).memory("cpu")["saved_bytes"] for n in ("stock", "cpu, recompute")}
    assert saved["cpu, recompute"] < saved["stock"]


# ---------------------------------------------------------------------------------------------------- real models


@pytest.mark.parametrize("key", [k for k, s in SETTINGS.items() if s.config])
def test_settings_are_openclips_own_configs(key):
    open_clip = pytest.importorskip("open_clip")
    setting = SETTINGS[key]
    config = open_clip.get_model_config(setting.config)
    vision = {"head_width": 64, **config["vision_cfg"]}
    assert config["embed_dim"] == setting.embed_dim
    assert (vision["image_size"], vision["patch_size"]) == (setting.image, setting.patch)
    assert (vision["width"], vision["head_width"]) == (setting.width, setting.head_dim)
    assert vision["layers"] == setting.layers
    assert set(vision) == {"image_size", "patch_size", "width", "head_width", "layers"}


def test_the_tower_written_out_is_openclips():
    pytest.importorskip("open_clip")
    setting = SETTINGS["tiny"]
    original, ours = clip(setting, 2, "cpu", torch.float32).eval(), Clip(setting, 2).eval()
    weights = {n: p for n, p in original.state_dict().items() if n.startswith("visual.")}
    ours.load_state_dict(weights)
    images = torch.randn(2, 3, setting.image, setting.image)
    with torch.no_grad():
        assert torch.equal(ours.visual(images), original.encode_image(images))


# ------------------------------------------------------------------------------------------------- the whole command


def test_untimed_ours_is_checked_and_run_once():
    group, case, calls = GROUPS["block"], replace(BLOCK, batch=3), []

    def build(case):
        return replace(group.named("cpu").build(case), run=lambda: calls.append(case))

    row = Contests("quick", untimed=True).row(group, case, replace(group.named("cpu"), build=build))
    assert row.status == "ok" and row.allowed > 0 and row.seconds is None and calls.count(case) == 1


@pytest.mark.slow
def test_the_command_gives_every_contender_a_row_and_a_verdict(tmp_path):
    """`pytest bench/ --rehearse` in a process of its own, without Triton's interpreter and without OpenCLIP."""
    blocker = tmp_path / "no_open_clip.py"
    blocker.write_text("import sys\nsys.modules['open_clip'] = None\n")
    env = clean_environment() | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    file = tmp_path / "rows.json"
    command = [sys.executable, "-m", "pytest", "-p", "no_open_clip", "-p", "no:cacheprovider", "bench/", "--rehearse"]
    done = subprocess.run([*command, "--rows", str(file)], cwd=ROOT, env=env, capture_output=True, text=True)
    shown = done.stdout
    assert done.returncode == 0, shown[-4000:] + done.stderr[-2000:]

    environment, rows = results.read(file)
    assert environment["versions"]["torch"]
    expected = {(g.name, k.name, c.name) for g in GROUPS.values() for k in g.cases("cpu", "rehearsal") for c in g.of(k)}
    assert {(r.group, r.case, r.contender) for r in rows} == expected
    for row in rows:
        if row.status == "not run":
            assert row.why
        else:
            assert row.seconds["median"] > 0 and row.ratio > 0 and row.peak_bytes >= 0 and row.allowed > 0
            assert row.baseline == GROUPS[row.group].baseline
    assert {r.contender for r in rows if r.status == "wrong"} <= {"peft", "peft, merged", "clip-lora"}
    assert "block: a tiny tower, batch 2, rank 8, float32" in shown
    assert "right, off by" in shown and "not run: runs on cuda, not on cpu" in shown and "wrong: dx is off by" in shown
