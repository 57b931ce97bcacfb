"""The least time each way of running the attention module can take: bytes, operations and saved activations, per chip.

    python -m bench.roofline [--chip A100 H100 H200] [--detail PATH] [--json FILE] [--doc FILE]

A path is a list of passes (`passes`); its time is the sum over passes of the slowest of what each needs: bytes
over bandwidth, operations over rate. Nothing here was measured: `chips` says where the rates come from. The
module runs from the block's LayerNorm to the residual, the training step over the whole tower, the MLPs too. Ranks are
the published ones; numbers are per layer, in the mean.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bench.base.shapes import SHAPES, Pass, Shape
from bench.base.tables import table, write_block
from bench.roofline.chips import CHIPS, Chip, Rates
from bench.roofline.passes import ATTENTION_BACKWARD, BACKWARD_EXPS, BACKWARD_PRODUCTS, PATHS, WORDS, mlp


@dataclass(frozen=True)
class Cost:
    """A path on a shape, per layer in the mean over the published ranks. Times in seconds: [peak, reached] per chip."""

    shape: str
    path: str
    forward_bytes: float
    backward_bytes: float
    forward_ops: dict[str, float]  # per chip: tiles, and so what is padded, are the architecture's
    backward_ops: dict[str, float]
    forward_exps: dict[str, float]
    backward_exps: dict[str, float]
    saved: float
    forward_seconds: dict[str, tuple[float, float]]
    backward_seconds: dict[str, tuple[float, float]]
    block_seconds: dict[str, tuple[float, float]]  # forward and backward with the MLP

    def seconds(self, chip: str, reached: bool = True) -> float:
        """Forward and backward of the module."""
        return self.forward_seconds[chip][reached] + self.backward_seconds[chip][reached]


def total(passes: Sequence[Pass], what: str | Callable[[Pass], float]) -> float:
    """Sum of a field (or of a function) over passes."""
    return sum(getattr(p, what) if isinstance(what, str) else what(p) for p in passes)


def seconds(passes: Sequence[Pass], rates: Rates) -> float:
    return total(passes, lambda p: p.seconds(rates))


def cost(path: str, shape: Shape, chips: Sequence[Chip]) -> Cost:
    """The path's mean over the shape's layers."""
    ranks = shape.ranks()
    runs = {(rank, c.arch): PATHS[path](shape, rank, c.arch) for rank in set(ranks) for c in chips}

    def mean(value: Callable[[tuple[list[Pass], list[Pass], float]], float], arch: int) -> float:
        return sum(value(runs[rank, arch]) for rank in ranks) / len(ranks)

    def each(what: str | Callable[[Pass], float], side: int) -> dict[str, float]:
        return {c.name: mean(lambda run: total(run[side], what), c.arch) for c in chips}

    def timed(side: int) -> dict[str, tuple[float, float]]:
        def at(c: Chip, rates: Rates) -> float:
            return mean(lambda run: seconds(run[side], rates), c.arch)

        return {c.name: (at(c, c.peak), at(c, c.reached)) for c in chips}

    def operations(p: Pass) -> float:
        return p.gemm + p.attention

    other = [p for half in mlp(shape) for p in half]
    forward, backward, any_arch = timed(0), timed(1), chips[0].arch
    block = {
        c.name: tuple(
            forward[c.name][i] + backward[c.name][i] + seconds(other, rates)
            for i, rates in enumerate((c.peak, c.reached))
        )
        for c in chips
    }
    return Cost(
        shape.name,
        path,
        mean(lambda run: total(run[0], "bytes"), any_arch),
        mean(lambda run: total(run[1], "bytes"), any_arch),
        each(operations, 0),
        each(operations, 1),
        each("exp", 0),
        each("exp", 1),
        mean(lambda run: run[2], any_arch),
        forward,
        backward,
        block,  # type: ignore[arg-type]
    )


def shares_of(path: str, shape: Shape, rank: int, chip: Chip, measured: float) -> tuple[float, float]:
    """The least seconds of a module's forward and backward over `measured`, at the peaks and at reachable rates."""
    forward, backward, _ = PATHS[path](shape, rank, chip.arch)
    passes = [*forward, *backward]
    return seconds(passes, chip.peak) / measured, seconds(passes, chip.reached) / measured


def all_costs(chips: Sequence[Chip]) -> list[Cost]:
    return [cost(path, shape, chips) for shape in SHAPES.values() for path in PATHS]


def cost_table(costs: Sequence[Cost], chips: Sequence[Chip]) -> str:
    """Bytes, operations and times of each path on one shape."""
    header = ["path", "GB fwd", "GB bwd", "TFLOP fwd", "TFLOP bwd", "G exp fwd", "G exp bwd", "saved MB"]
    header += [f"{c.name} ms, fwd + bwd (peak)" for c in chips]
    rows = []
    for c in costs:
        row: list[Any] = [WORDS.get(c.path, c.path)]
        row += [f"{b / 1e9:.2f}" for b in (c.forward_bytes, c.backward_bytes)]
        row += [_by_architecture(ops, chips, 1e12, 3) for ops in (c.forward_ops, c.backward_ops)]
        row += [_by_architecture(exps, chips, 1e9, 2) for exps in (c.forward_exps, c.backward_exps)]
        row.append(f"{c.saved / 1e6:.0f}")
        for chip in chips:
            f, b = c.forward_seconds[chip.name], c.backward_seconds[chip.name]
            row.append(f"{1e3 * f[1]:.2f} + {1e3 * b[1]:.2f} ({1e3 * (f[0] + b[0]):.2f})")
        rows.append(row)
    return table(header, rows)


def _by_architecture(values: dict[str, float], chips: Sequence[Chip], unit: float, digits: int) -> str:
    """One number, or one for each architecture where they differ."""
    return " / ".join(dict.fromkeys(f"{values[c.name] / unit:.{digits}f}" for c in chips))


def target_table(costs: Sequence[Cost], chips: Sequence[Chip]) -> str:
    """The issue's targets as this model sees them: `stacked` against the peers, and what is kept."""
    by = {(c.shape, c.path): c for c in costs}
    rows = []
    for shape in SHAPES.values():
        ours = by[shape.name, "stacked"]
        peers = {name: by[shape.name, name] for name in ("floor", "stock", "plain", "factored", "merged", "peft")}
        kept = by[shape.name, "stacked, recompute"]
        lines: list[tuple[str, str, list[str]]] = [
            ("time / stock frozen, as OpenCLIP runs it", "≤ 1.05", _ratio(ours, peers["stock"], chips)),
            ("time / stock frozen without a copy", "", _ratio(ours, peers["floor"], chips)),
            ("plain-PyTorch HA-LoRA / ours", "≥ 1.6", _ratio(peers["plain"], ours, chips)),
            ("PEFT / ours", "≥ 1.4", _ratio(peers["peft"], ours, chips)),
            ("factored through cuBLAS / ours", "", _ratio(peers["factored"], ours, chips)),
            ("merged weights through autograd / ours", "≥ 1.25", _ratio(peers["merged"], ours, chips)),
            ("training step / the frozen model's", "≤ 1.03", [_step(ours, peers["stock"], c) for c in chips]),
            ("saved / plain's", "≤ 0.6", [f"{ours.saved / peers['plain'].saved:.2f}"] * len(chips)),
            ("saved / plain's, without the block's input", "≤ 0.6",
             [f"{(ours.saved - shape.row) / (peers['plain'].saved - shape.row):.2f}"] * len(chips)),
            ("saved with recompute / plain's", "≤ 0.4", [f"{kept.saved / peers['plain'].saved:.2f}"] * len(chips)),
            ("time with recompute / stock frozen", "", _ratio(kept, peers["stock"], chips)),
            ("delta / stacked", "", _ratio(by[shape.name, "delta"], ours, chips)),
            ("one_pass / stacked", "", _ratio(by[shape.name, "one_pass"], ours, chips)),
        ]  # fmt: skip
        rows += [[shape.name, *line[:2], *line[2]] for line in lines]
    return table(["shape", "what", "target", *(c.name for c in chips)], rows)


def _ratio(one: Cost, other: Cost, chips: Sequence[Chip]) -> list[str]:
    return [f"{one.seconds(c.name) / other.seconds(c.name):.2f}" for c in chips]


def _step(ours: Cost, stock: Cost, chip: Chip) -> str:
    return f"{ours.block_seconds[chip.name][1] / stock.block_seconds[chip.name][1]:.2f}"


def backward_table(chips: Sequence[Chip]) -> str:
    """What `stacked` would take with an attention backward pass of fewer products and exponentials."""
    rows = []
    for shape in SHAPES.values():
        plain = cost("plain", shape, chips)
        for products, exps in ((9, 3), (7, 2), (5, 1)):
            row = [shape.name, str(products), str(exps)]
            for chip in chips:
                own = 0.0
                for rank in shape.ranks():
                    forward, backward, _ = PATHS["stacked"](shape, rank, chip.arch)
                    own += seconds([*forward, *(_with(p, products, exps) for p in backward)], chip.reached)
                own /= shape.layers
                row.append(f"{1e3 * own:.2f} ({plain.seconds(chip.name) / own:.2f})")
            rows.append(row)
    return table(["shape", "products", "exponentials", *(f"{c.name} ms (plain's / it)" for c in chips)], rows)


def _with(p: Pass, products: int, exps: int) -> Pass:
    if p.name != ATTENTION_BACKWARD:
        return p
    return replace(p, attention=p.attention * products / BACKWARD_PRODUCTS, exp=p.exp * exps / BACKWARD_EXPS)


def detail_table(path: str, shape: Shape, rank: int, chips: Sequence[Chip]) -> str:
    """Every pass of a path at one rank."""
    runs = [PATHS[path](shape, rank, c.arch) for c in chips]
    rows: list[list[str]] = []
    for at, side in enumerate(("forward", "backward")):
        for same in zip(*(run[at] for run in runs), strict=True):
            by_chip = {c.name: p for c, p in zip(chips, same, strict=True)}
            ops = {name: p.gemm + p.attention for name, p in by_chip.items()}
            exps = {name: p.exp for name, p in by_chip.items()}
            counts = [_by_architecture(ops, chips, 1e9, 1), _by_architecture(exps, chips, 1e6, 0)]
            times = [f"{1e3 * by_chip[c.name].seconds(c.reached):.3f}" for c in chips]
            rows.append([side, same[0].name, f"{same[0].bytes / 1e6:.0f}", *counts, *times])
    header = ["", "pass", "MB", "GFLOP", "M exp", *(f"{c.name} ms" for c in chips)]
    return table(header, rows)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.roofline", description=__doc__.splitlines()[0])
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
    for key, shape in SHAPES.items():
        text = cost_table([c for c in costs if c.shape == shape.name], chips)
        rates = "the rates that good kernels reach (in brackets: the datasheet's peaks)"
        print(f"\n{shape.name}, per layer; ms at {rates}\n\n{text}")
        if given.doc:
            write_block(given.doc, f"roofline {key}", text)
    print(f"\nThe targets, by the model\n\n{target_table(costs, chips)}")
    print(f"\nThe attention backward pass by its products, whole module\n\n{backward_table(chips)}")
    if given.doc:
        write_block(given.doc, "roofline targets", target_table(costs, chips))
        write_block(given.doc, "roofline backward", backward_table(chips))
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        content = {"chips": {c.name: asdict(c) for c in chips}, "costs": [asdict(c) for c in costs]}
        given.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0
