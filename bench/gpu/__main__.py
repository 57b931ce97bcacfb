"""Everything that only a GPU can show, in one command: tests, benches, sweeps, profile, and what of the targets is met.

    python -m bench.gpu --out DIR                under nine minutes, no network, no installation
    python -m bench.gpu --out DIR --tune         the search for tile rows as well (--minutes 15)
    python -m bench.gpu --out DIR --rehearse     the same on a CPU, tiny, Triton's kernels in the interpreter: a minute

Parts, each a process under a time limit of its own, what matters first. The state is the files in DIR/parts: started
again, the command runs what is not yet complete there. Writes gpu.json (environment, parts, rows) and summary.md to DIR
after every part, traces.tar.gz at the end; exits with 1 where a part failed. Needs torch, triton, pytest; what else is
missing is said.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

import fastheads.kernels
from bench.base.checkout import ROOT
from bench.gpu.run import Outcome, Part, Run
from bench.report.gpu_page import summary
from fastheads.files import write_whole

# What we most need to know first. After the first two, which are over in two minutes, a run that is cut off is of use:
# the first also compiles, in several processes, what the second times.
PARTS = (
    Part("correctness", "tests", 55, 30, ("bench/", "-k", "test_block", "--untimed")),
    Part("block", "bench", 60, 25, ("bench/", "-k", "test_block")),
    Part("host", "python", 50, 20, ("bench.gpu.parts", "host")),
    Part("tiles", "python", 65, 25, ("bench.tune", "--open")),
    Part("mmd", "bench", 50, 25, ("bench/", "-k", "test_mmd")),
    Part("model step", "bench", 65, 30, ("bench/", "-k", "test_model_step")),
    Part("profile", "python", 40, 20, ("bench.gpu.parts", "profile")),
    Part("rates", "python", 15, 15, ("bench.gpu.parts", "rates")),
    Part(
        "tests", "tests", 55, 30, ("tests/ops/test_gpu.py", "tests/test_cuda_graphs.py", "tests/ops", "tests/kernels")
    ),
    Part("contests", "bench", 45, 25, ("bench/", "-k", "test_attention or test_inference")),
    Part("sweeps", "python", 35, 20, ("bench.gpu.parts", "sweeps")),
)
TUNE = Part("tune", "python", 300, 40, ("bench.tune",))
REHEARSAL = (
    Part("tests", "tests", 60, 1, ("tests/bench/roofline/test_roofline.py",)),
    Part("benches", "bench", 240, 1, ("bench/", "--rehearse")),
    Part("host", "python", 90, 1, ("bench.gpu.parts", "host")),
    Part("tiles", "python", 90, 1, ("bench.tune", "--open")),
    Part("profile", "python", 90, 1, ("bench.gpu.parts", "profile")),
    Part("rates", "python", 30, 1, ("bench.gpu.parts", "rates")),
    Part("sweeps", "python", 90, 1, ("bench.gpu.parts", "sweeps")),
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu.json, traces.tar.gz and summary.md")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with tiny problems")
    parser.add_argument("--minutes", type=float, default=9.0, help="all of it may take")
    parser.add_argument("--tune", action="store_true", help="search the tile tables as well")
    names = tuple(dict.fromkeys(part.name for part in (*PARTS, *REHEARSAL, TUNE)))
    parser.add_argument("--again", nargs="+", default=[], choices=names, metavar="PART", help="run these once more")
    given = parser.parse_args(argv)
    started = time.monotonic()
    parts = [*(REHEARSAL if given.rehearse else PARTS), *([TUNE] if given.tune else [])]
    if not given.rehearse and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --rehearse runs the same on the CPU")
    for module in (fastheads, fastheads.kernels):
        if ROOT not in Path(str(module.__file__)).resolve().parents:
            parser.error(f"{module.__name__} is {module.__file__}, not that of {ROOT}: run this in {ROOT}")

    def say(line: str) -> None:
        print(f"[{time.monotonic() - started:4.0f} s] {line}", flush=True)

    run = Run(given.out.resolve(), given.rehearse)
    try:
        where = run.environment()
    except ValueError as error:
        parser.error(str(error))
    say(f"{where['device']}, torch {torch.__version__}, commit {where['commit'][:10]}, fastheads of {ROOT}")
    for name in given.again:
        run.forget(name)
    outcomes = {part.name: run.outcome(part.name) or Outcome("left out", why="not begun") for part in parts}
    for part in parts:
        left = 60 * given.minutes - (time.monotonic() - started) - 5
        if outcomes[part.name].status == "done":
            say(f"{part.name}: there already")
        elif left < part.least:
            say(f"{part.name}: no time left of {given.minutes:g} minutes")
        else:
            most = left if part is parts[-1] else min(part.seconds, left)  # the last has whatever is over
            say(f"{part.name}, at most {most:.0f} s")
            outcomes[part.name] = outcome = run.run(part, most)
            if outcome.status != "done":
                say(f"  {outcome.status}: {outcome.why}")
        text = summary(run.collect(where, outcomes))
        write_whole(run.out / "summary.md", text.encode())
    run.archive()
    print(f"\n{text}")
    say(f"written to {run.out}")
    return 1 if any(o.status == "failed" for o in outcomes.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
