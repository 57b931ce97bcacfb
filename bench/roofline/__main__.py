"""The roofline as tables: what each way of running the attention module moves, computes, keeps and takes at the least.

Nothing here is measured: it is the model of `bench.roofline.costs`.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from bench.base.results import write_json
from bench.base.tables import table, write_block
from bench.base.towers import SHAPES, Setting
from bench.roofline.chips import CHIPS, Chip
from bench.roofline.costs import Cost, all_costs, cost, mean, run_of, seconds
from bench.roofline.hosts import host_table
from bench.roofline.loops import backward_counts, backward_tiles
from bench.roofline.mmd import mmd_table
from bench.roofline.passes import ATTENTION_BACKWARD, PATHS, WORDS, Run


def cost_table(costs: Sequence[Cost], chips: Sequence[Chip]) -> str:
    """Bytes, operations and times of each path on one shape."""
    header = ["path", "GB fwd", "GB bwd", "TFLOP fwd", "TFLOP bwd", "G exp fwd", "G exp bwd", "saved MB"]
    header += [f"{c.name} ms, fwd + bwd (peak)" for c in chips]
    rows = []
    for c in costs:
        row = [WORDS.get(c.path, c.path)]
        row += [f"{b / 1e9:.2f}" for b in (c.forward_bytes, c.backward_bytes)]
        row += [_by_architecture(ops, 1e12, 3) for ops in (c.forward_ops, c.backward_ops)]
        row += [_by_architecture(exps, 1e9, 2) for exps in (c.forward_exps, c.backward_exps)]
        row.append(f"{c.saved / 1e6:.0f}")
        for chip in chips:
            f, b = c.forward_seconds[chip.name], c.backward_seconds[chip.name]
            row.append(f"{1e3 * f[1]:.2f} + {1e3 * b[1]:.2f} ({1e3 * (f[0] + b[0]):.2f})")
        rows.append(row)
    return table(header, rows)


def _by_architecture(values: Mapping[str, float], unit: float, digits: int) -> str:
    """One number, or one for each architecture where they differ. values: per chip."""
    return " / ".join(dict.fromkeys(f"{value / unit:.{digits}f}" for value in values.values()))


def target_table(costs: Sequence[Cost], chips: Sequence[Chip]) -> str:
    """The targets as this model sees them: `stacked` against the peers, and what is kept."""
    rows = []
    for shape in SHAPES.values():
        by = {c.path: c for c in costs if c.shape == shape.name}
        ours, stock, plain = by["stacked"], by["stock"], by["plain"]

        def times(one: str, other: str, by: dict[str, Cost] = by) -> list[str]:
            return [f"{by[one].seconds(c.name) / by[other].seconds(c.name):.2f}" for c in chips]

        steps = [f"{ours.block_seconds[c.name][1] / stock.block_seconds[c.name][1]:.2f}" for c in chips]
        recomputed = by["stacked, recompute"].saved / plain.saved
        without_input = (ours.saved - shape.row) / (plain.saved - shape.row)
        lines = [
            ("time / stock frozen, as OpenCLIP runs it", "≤ 1.05", times("stacked", "stock")),
            ("time / stock frozen without a copy", "", times("stacked", "floor")),
            ("plain-PyTorch HA-LoRA / ours", "≥ 1.6", times("plain", "stacked")),
            ("PEFT / ours", "≥ 1.4", times("peft", "stacked")),
            ("factored through cuBLAS / ours", "", times("factored", "stacked")),
            ("merged weights through autograd / ours", "≥ 1.25", times("merged", "stacked")),
            ("training step / the frozen model's", "≤ 1.03", steps),
            ("saved / plain's", "≤ 0.6", [f"{ours.saved / plain.saved:.2f}"] * len(chips)),
            ("saved / plain's, without the block's input", "≤ 0.6", [f"{without_input:.2f}"] * len(chips)),
            ("saved with recompute / plain's", "≤ 0.4", [f"{recomputed:.2f}"] * len(chips)),
            ("time with recompute / stock frozen", "", times("stacked, recompute", "stock")),
            ("delta / stacked", "", times("delta", "stacked")),
            ("one_pass / stacked", "", times("one_pass", "stacked")),
        ]
        rows += [[shape.name, what, target, *found] for what, target, found in lines]
    return table(["shape", "what", "target", *(c.name for c in chips)], rows)


def backward_table(chips: Sequence[Chip]) -> str:
    """What `stacked` would take with an attention backward pass of other products and exponentials, padded alike."""
    rows = []
    for shape in SHAPES.values():
        plain = cost("plain", shape, chips)
        for products, exps in ((9, 3), (7, 2), (5, 1)):
            row = [shape.name, str(products), str(exps)]
            for chip in chips:
                own = _with(products, exps, shape, chip)
                row.append(f"{1e3 * own:.2f} ({plain.seconds(chip.name) / own:.2f})")
            rows.append(row)
    return table(["shape", "products", "exponentials", *(f"{c.name} ms (plain's / it)" for c in chips)], rows)


def _with(products: int, exps: int, shape: Setting, chip: Chip) -> float:
    """Seconds of `stacked` with so many products and exponentials in attention's backward pass."""
    own_products, own_exps = backward_counts(
        backward_tiles(chip.arch, shape.width // shape.heads, shape.tokens, shape.batch * shape.heads)
    )

    def taken(run: Run) -> float:
        was = next(p for p in run.backward if p.name == ATTENTION_BACKWARD)
        own = replace(was, attention=was.attention * products / own_products, exp=was.exp * exps / own_exps)
        return seconds((own if p is was else p for p in (*run.forward, *run.backward)), chip.reached)

    return mean("stacked", shape, chip.arch, taken)


def detail_table(path: str, shape: Setting, rank: int, chips: Sequence[Chip]) -> str:
    runs = [run_of(path, shape, rank, c.arch) for c in chips]
    rows: list[list[str]] = []
    for side in ("forward", "backward"):
        for same in zip(*(getattr(run, side) for run in runs), strict=True):
            ops = {c.name: p.gemm + p.attention for c, p in zip(chips, same, strict=True)}
            exps = {c.name: p.exp for c, p in zip(chips, same, strict=True)}
            counts = [_by_architecture(ops, 1e9, 1), _by_architecture(exps, 1e6, 0)]
            times = [f"{1e3 * p.seconds(c.reached):.3f}" for c, p in zip(chips, same, strict=True)]
            rows.append([side, same[0].name, f"{same[0].bytes / 1e6:.0f}", *counts, *times])
    return table(["", "pass", "MB", "GFLOP", "M exp", *(f"{c.name} ms" for c in chips)], rows)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.roofline", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--chip", nargs="+", choices=sorted(CHIPS), default=list(CHIPS))
    parser.add_argument("--detail", choices=list(PATHS), help="list this path's passes, at rank 2")
    parser.add_argument("--json", type=Path, help="write all numbers there")
    parser.add_argument("--doc", type=Path, help="put the tables into the blocks of this document")
    given = parser.parse_args(argv)
    chips = [CHIPS[name] for name in given.chip]
    if given.detail:
        for shape in SHAPES.values():
            print(f"\n{given.detail}, {shape.name}, rank 2\n\n{detail_table(given.detail, shape, 2, chips)}")
        return 0
    costs = all_costs(chips)
    rates = "per layer; ms at the rates that good kernels reach (in brackets: the datasheet's peaks)"
    tables = {}
    for key, shape in SHAPES.items():
        own = [c for c in costs if c.shape == shape.name]
        tables[key] = f"{shape.name}, {rates}", cost_table(own, chips)
    tables["targets"] = "The targets, by the model", target_table(costs, chips)
    tables["hosts"] = "Other libraries' attention over its own stock self, frozen, by the model", host_table(chips)
    tables["backward"] = "The attention backward pass by its products, whole module", backward_table(chips)
    tables["mmd"] = "The MMD by Triton, loss and gradient; a rank's share where there are several", mmd_table(chips)
    for block, (title, text) in tables.items():
        print(f"\n{title}\n\n{text}")
        if given.doc:
            write_block(given.doc, f"roofline {block}", text)
    if given.json:
        write_json(given.json, {"chips": {c.name: asdict(c) for c in chips}, "costs": [asdict(c) for c in costs]})
    return 0


if __name__ == "__main__":
    sys.exit(main())
