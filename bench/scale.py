"""Past one machine: what a rank holds and sends, how long a step takes, and where more GPUs stop helping.

    python -m bench.scale --json bench/results/scale.json --doc docs/scale.md     some seconds, no GPU

Nothing here was measured on a GPU. Bytes that a rank holds: `fastheads.plan`'s ledger. Bytes that it sends: the
formulas below, held against counts of gloo runs with 2 and 4 processes (`tests/bench/test_scale.py`). Times: the
roofline's model at the rates that good kernels reach (`bench.roofline`), and these, which are assumptions:

- a rank sends at LINKS: 70 % of NVLink's 300 GB/s inside a node of 8, 80 % of its share of the network between nodes;
- a collective's ring takes n − 1 hops (all-reduce: twice) of HOP each; DDP sums in buckets of BUCKET, FSDP2 (as in
  `fastheads.train.sharding`) gathers and scatters block by block, and sums what is whole at the end;
- DDP's all-reduce hides behind the backward pass, FSDP2's gathers and scatters behind both passes, as far as they are
  long enough; the MMD's gather hides behind nothing, for the loss waits for it.
"""

import argparse
import math
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from bench.base.results import read_json, write_json
from bench.base.tables import put, table
from bench.base.towers import SETTINGS, Setting
from bench.roofline.chips import CHIPS
from bench.roofline.costs import cost, seconds
from bench.roofline.mmd import Problem, passes
from fastheads.train.models import build
from fastheads.train.planning import CONTEXT, GPUS, Step

NODE, CHIP, ROOM = 8, "A100", GPUS["A100-80"] - CONTEXT
NVLINK, HOP = 0.7 * 300e9, 10e-6  # bytes per second of a rank, seconds
BUCKET = 25 * 2**20  # bytes, DDP's default
MMD_RINGS = 5  # two of the losses' sum; features, ids and sizes
LINKS = {"200 Gb/s a GPU": 0.8 * 25e9, "50 Gb/s a GPU": 0.8 * 6.25e9}  # DGX A100: eight times 200 Gb/s; 400 Gb/s a node
WORLDS = (8, 16, 32, 64)
BATCHES = {"L/14": 256, "H/14": 128}  # images of a rank
METHODS, ENGINES = ("hap", "fine-tune"), ("DDP", "FSDP2")
FLOAT, INT64 = 4, 8
DOMAINNET = 586_575  # images
KEEPS = 0.8  # of the rate of so many single GPUs: below, it no longer scales


@dataclass(frozen=True)
class Volumes:
    """Bytes of a step's collectives: of what is summed, gathered from all ranks, summed in shares, handed on."""

    all_reduce: int = 0
    all_gather: int = 0
    reduce_scatter: int = 0
    broadcast: int = 0

    def sent(self, world: int) -> float:
        """Bytes that each rank sends in rings."""
        return (world - 1) / world * (2 * self.all_reduce + self.all_gather + self.reduce_scatter) + self.broadcast


def ddp_volumes(model: nn.Module) -> Volumes:
    """DDP sums the gradients of what is trained, and hands the first rank's buffers on."""
    return Volumes(
        all_reduce=sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad),
        broadcast=sum(b.numel() * b.element_size() for b in model.buffers()),
    )


def fsdp_volumes(tower: nn.Module, world: int, whole: Collection[nn.Parameter] = ()) -> Volumes:
    """FSDP2: a tower is gathered for each pass, and gradients of what is trained are summed in shares; but of the
    parameters `whole` on all ranks gradients are summed as they are.

    A parameter is cut along its first dimension, whose last shares are filled up.
    """

    def padded(p: nn.Parameter) -> int:
        return math.ceil(len(p) / world) * world * (p.numel() // len(p)) if p.dim() and len(p) else 0

    kept = set(map(id, whole))
    cut = [p for p in tower.parameters() if id(p) not in kept]
    return Volumes(
        all_reduce=FLOAT * sum(p.numel() for p in whole),
        all_gather=2 * FLOAT * sum(map(padded, cut)),
        reduce_scatter=FLOAT * sum(padded(p) for p in cut if p.requires_grad),
    )


def mmd_volumes(layers: int, batch: int, width: int, world: int) -> Volumes:
    """The MMD over all ranks' batches (`group=`): features, ids and sizes are gathered, losses by layer summed."""
    return Volumes(
        all_reduce=layers * FLOAT, all_gather=world * (layers * batch * width * FLOAT + batch * INT64 + INT64)
    )


def time_of(volumes: Volumes, world: int, link: float, rings: int) -> float:
    """Seconds of collectives that go round `rings` times in all."""
    return volumes.sent(world) / (NVLINK if world <= NODE else link) + rings * (world - 1) * HOP


def compute(setting: Setting, method: str) -> float:
    """Seconds of a step's blocks on one GPU."""
    chip = CHIPS[CHIP]
    block = cost("stacked" if method == "hap" else "stock", setting, [chip]).block_seconds[CHIP][1]
    weights = 0.0 if method == "hap" else 12 * setting.product / chip.reached.gemm  # dW: q, k, v, out and the MLP's 8
    return setting.layers * (block + weights)


def mmd_compute(setting: Setting, world: int) -> float:
    """Seconds of this rank's rows against all, every layer, with DomainBed's kernels."""
    own = passes(Problem(world * setting.batch, setting.width, FLOAT, setting.batch, False), CHIPS[CHIP].arch)
    return setting.layers * seconds(own, CHIPS[CHIP].reached)


def rows_of(key: str, method: str) -> list[dict[str, Any]]:
    """A model and a method: every engine, network and number of GPUs."""
    setting = SETTINGS[key].shape(BATCHES[key])
    step = Step(build(SETTINGS[key].config), method=method, checkpointing=method == "fine-tune", classes=345)
    visual = step.model.visual
    blocks = list(visual.transformer.resblocks)
    trained = [p for p in visual.parameters() if p.requires_grad]
    whole = trained if method == "hap" else []
    cut = sum(p.numel() for p in visual.parameters()) - sum(p.numel() for p in whole)
    held, sharded = (
        step.total(setting.batch),
        FLOAT * cut * (1 if whole else 4),
    )  # weights; gradients, AdamW's two states
    largest = max(sum(p.numel() for p in block.parameters()) for block in blocks)
    once = compute(setting, method)
    again = 1 + (method == "fine-tune") / 3  # checkpointing: the forward pass again, a third of the step
    found = []
    for engine in ENGINES:
        for network, link in LINKS.items():
            for world in WORLDS:
                if engine == "DDP":
                    volumes, bytes_held = ddp_volumes(step.model), held + step.gradient_bytes
                    rings = 2 * math.ceil(volumes.all_reduce / BUCKET) + bool(volumes.broadcast)
                    hidden = 2 / 3 * once
                else:
                    volumes = fsdp_volumes(visual, world, whole)
                    bytes_held = held - sharded + sharded // world + 2 * FLOAT * largest
                    rings = (2 if whole else 3) * (len(blocks) + 1) + 2 * bool(
                        whole
                    )  # the rest of the tower is one more
                    hidden = once
                mmd = mmd_volumes(setting.layers, setting.batch, setting.width, world)
                beside = {"loss": 0.0, "gather": 0.0}
                if method == "hap":
                    beside = {"loss": mmd_compute(setting, world), "gather": time_of(mmd, world, link, MMD_RINGS)}
                    bytes_held += mmd.all_gather
                else:
                    mmd = Volumes()
                shown = max(0.0, time_of(volumes, world, link, rings) - again * hidden)
                alone = again * once + (mmd_compute(setting, 1) if method == "hap" else 0.0)
                took = again * once + beside["loss"] + beside["gather"] + shown
                found.append(
                    {
                        "model": SETTINGS[key].config,
                        "method": method,
                        "engine": engine,
                        "network": network,
                        "gpus": world,
                        "batch": setting.batch,
                        "rank_bytes": bytes_held,
                        "volumes": asdict(volumes),
                        "mmd_all_gather": mmd.all_gather,
                        "compute_seconds": again * once,
                        "mmd_seconds": beside["loss"],
                        "mmd_gather_seconds": beside["gather"],
                        "exposed_seconds": shown,
                        "step_seconds": took,
                        "images_per_second": world * setting.batch / took,
                        "of_linear": alone / took,
                    }
                )
    return found


def scale_table(rows: Sequence[Mapping[str, Any]]) -> str:
    header = ["GPUs", "network", "GB a rank", "all-reduce MB", "all-gather MB", "reduce-scatter MB", "MMD's gather MB"]
    header += ["step ms", "of it MMD", "of it waiting", "images/s", "of linear", "an epoch of DomainNet, min"]
    cells = []
    for row in rows:
        volumes = [f"{row['volumes'][name] / 1e6:,.1f}" for name in ("all_reduce", "all_gather", "reduce_scatter")]
        waiting = row["mmd_gather_seconds"] + row["exposed_seconds"]
        own = [f"{row['rank_bytes'] / 1e9:.1f}", *volumes, f"{row['mmd_all_gather'] / 1e6:,.0f}"]
        own += [f"{1e3 * s:,.0f}" for s in (row["step_seconds"], row["mmd_seconds"], waiting)]
        own += [f"{row['images_per_second']:,.0f}", f"{row['of_linear']:.2f}"]
        own.append(f"{DOMAINNET / row['images_per_second'] / 60:.1f}")
        cells.append([row["gpus"], row["network"], *own])
    return table(header, cells)


def stops_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Where each way falls below KEEPS of linear, and whether a rank's bytes fit."""
    cells = []
    for row in rows:
        if row["gpus"] != WORLDS[0]:
            continue
        same = [r for r in rows if all(r[k] == row[k] for k in ("model", "method", "engine", "network"))]
        below = next((str(r["gpus"]) for r in same if r["of_linear"] < KEEPS), f"not by {WORLDS[-1]}")
        last = same[-1]
        parts = {"the MMD": last["mmd_seconds"], "the MMD's gather": last["mmd_gather_seconds"]}
        parts |= {f"{last['engine']}'s own": last["exposed_seconds"]}
        most = max(parts, key=lambda name: parts[name])
        why = f"{most}, {1e3 * parts[most]:,.0f} of {1e3 * last['step_seconds']:,.0f} ms" if parts[most] else "nothing"
        fits = "yes" if all(r["rank_bytes"] <= ROOM for r in same) else "no"
        cells.append([row["model"], row["method"], row["engine"], row["network"], fits, below, why])
    return table(
        ["model", "method", "engine", "network", "fits 80 GB", f"below {KEEPS} of linear at", "the most at 64"], cells
    )


def loader_table(rows: Sequence[Mapping[str, Any]], loading: Mapping[str, Any]) -> str:
    """Cores that must load for a node's GPUs, by the rates that `fastheads bench-data` measured on two."""
    per_core = {row["what"]: row["images_per_second"] / 2 for row in loading["rows"]}
    cells = []
    for row in rows:
        if row["gpus"] == NODE and row["engine"] == "DDP" and row["network"] == next(iter(LINKS)):
            needed = [f"{row['images_per_second'] / per_core[what]:.0f}" for what in ("shards", "memory")]
            cells.append([row["model"], row["method"], f"{row['images_per_second']:,.0f}", *needed])
    return table(["model", "method", "images/s a node of 8", "cores, from shards", "cores, from memory"], cells)


def blocks(content: Mapping[str, Any], loading: Mapping[str, Any]) -> dict[str, str]:
    """What the page has, by block."""
    rows = content["rows"]
    made = {"scale stops": stops_table(rows), "scale loader": loader_table(rows, loading)}
    for row in rows:
        name = f"scale {row['model']} {row['method']} {row['engine']}"
        if name not in made:
            made[name] = scale_table([r for r in rows if f"scale {r['model']} {r['method']} {r['engine']}" == name])
    return made


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.scale", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write all numbers there")
    parser.add_argument("--doc", type=Path, help="put the tables into the blocks of this document")
    given = parser.parse_args(argv)
    content = {"rows": [row for key in BATCHES for method in METHODS for row in rows_of(key, method)]}
    loading = read_json(Path(__file__).parent / "results" / "loading.json")
    put(blocks(content, loading), given.doc)
    if given.json:
        write_json(given.json, content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
