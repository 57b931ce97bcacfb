"""The roofline against numbers worked out by hand, and against what PyTorch really keeps and moves."""

import json

import pytest

from bench.base.checkout import ROOT
from bench.base.tables import read_block
from bench.base.towers import SHAPES
from bench.roofline.__main__ import main, target_table
from bench.roofline.chips import CHIPS, Rates, chip_of
from bench.roofline.costs import all_costs, cost
from bench.roofline.hosts import NORMS, Host, frozen, host_table, patched
from bench.roofline.passes import PATHS, Pass

B16 = SHAPES["B/16"]  # 256 × 197 tokens, width 768, 12 heads
ROW = 256 * 197 * 768 * 2


def test_sizes_of_vit_b16_are_those_worked_out_by_hand():
    assert B16.row == ROW == 77_463_552
    assert B16.product == 59_492_007_936  # 2 · 50,432 · 768²
    assert B16.scores == 119_221_248  # 256 · 12 · 197²
    assert B16.attention == 15_260_319_744  # 2 · scores · 64
    assert B16.lse == 2_420_736
    assert B16.columns(2) == 48 and B16.low(2) == 4_841_472
    assert B16.low_product(2) == 2 * 50_432 * 48 * 768
    assert B16.up_product(2) == 2 * 50_432 * 64 * 2 * 24  # 24 heads of q and v, [N, 2] × [2, 64]
    assert B16.ranks() == (2,) * 10 + (8,) * 2


def test_the_frozen_floor_adds_up():
    forward, backward, saved = PATHS["floor"](B16, 2)
    # LayerNorm 2, projection 4, attention 4, out_proj 2, residual 3 rows; four D × D weights; the log-sum-exp
    assert sum(p.bytes for p in forward) == 15 * ROW + 8 * 768**2 + B16.lse
    assert sum(p.gemm for p in forward) == 4 * B16.product
    assert sum(p.attention for p in forward) == 2 * B16.attention
    assert sum(p.attention for p in backward) == 5 * B16.attention
    assert saved == 5 * ROW + B16.lse


def test_a_hosts_stock_and_patched_modules_add_up():
    views, three, norms = Host(), Host(three=True), Host(between=NORMS)
    sides = [(*run.forward, *run.backward) for run in (frozen(views, B16), frozen(three, B16), PATHS["floor"](B16, 2))]
    assert len({sum(p.gemm for p in side) for side in sides}) == 1  # the same products
    # dQ, dK and dV stacked (6) in place of nothing, flash attention's own passes (7 more than the floor's)
    moved = [sum(p.bytes for p in side) for side in sides]
    assert moved[0] - moved[2] == 6 * ROW + 7 * ROW
    assert moved[1] - moved[0] == 2 * (6 - 4) * ROW + (6 - 6) * ROW  # x, and dX, by three products
    plain, halved = (patched(host, B16, 80) for host in (views, norms))
    extra = sum(p.bytes for p in (*halved.forward, *halved.backward)) - sum(
        p.bytes for p in (*plain.forward, *plain.backward)
    )
    assert extra == 12 * ROW + NORMS.forward * ROW + NORMS.backward * ROW + ROW  # packed twice; x read again for T


def test_the_page_has_the_hosts_table():
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert read_block(page, "roofline hosts").strip() == host_table(list(CHIPS.values())).strip()


def test_a_pass_takes_as_long_as_the_slowest_of_what_it_needs():
    rates = Rates(gemm=100, attention=50, exp=10, hbm=20, l2=40)
    assert Pass("bytes", bytes=40).seconds(rates) == 2
    assert Pass("products", bytes=40, gemm=100, attention=100).seconds(rates) == 3
    assert Pass("exponentials", bytes=40, exp=50).seconds(rates) == 5
    assert Pass("cache", bytes=40, l2=400).seconds(rates) == 10


def test_the_mean_weighs_the_published_ranks():
    chips = [CHIPS["A100"]]
    saved = cost("stacked", B16, chips).saved
    assert saved == pytest.approx(5 * ROW + B16.lse + (10 * B16.low(2) + 2 * B16.low(8)) / 12)


def test_reached_rates_never_beat_the_datasheet():
    for chip in CHIPS.values():
        for name in ("gemm", "attention", "exp", "hbm", "l2"):
            assert getattr(chip.reached, name) <= getattr(chip.peak, name), (chip.name, name)
    for found in all_costs(list(CHIPS.values())):
        for chip in CHIPS:
            assert found.seconds(chip, reached=False) <= found.seconds(chip)


def test_no_path_is_under_the_frozen_floor():
    chips = list(CHIPS.values())
    for shape in SHAPES.values():
        floor = cost("floor", shape, chips)
        for path in PATHS:
            if path != "one_pass":  # keeps q, k and v off memory, which the floor does not
                assert all(cost(path, shape, chips).seconds(c) >= floor.seconds(c) for c in CHIPS), path


def test_chips_are_found_by_the_names_torch_gives_them():
    assert chip_of("NVIDIA H100 80GB HBM3") is CHIPS["H100"]
    assert chip_of("NVIDIA A100-SXM4-80GB") is CHIPS["A100"]
    assert chip_of("NVIDIA T4") is None


def test_the_command_prints_tables_and_writes_json(tmp_path, capsys):
    assert main(["--chip", "H200", "--json", str(tmp_path / "roofline.json")]) == 0
    out = capsys.readouterr().out
    assert "ViT-L/14" in out and "H200" in out and "A100" not in out
    written = json.loads((tmp_path / "roofline.json").read_text())
    assert {c["path"] for c in written["costs"]} == set(PATHS)
    assert set(written["chips"]) == {"H200"}
    assert "≤ 1.05" in target_table(all_costs([CHIPS["A100"]]), [CHIPS["A100"]])
