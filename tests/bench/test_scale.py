"""The communication that bench.scale counts by formula is what gloo's collectives carry, on 2 and on 4 processes."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from comms import communicate_on_rank
from processes import on_ranks
from standins import patched

import fastheads
from bench.base.results import read_json
from bench.base.tables import read_block
from bench.scale import Volumes, blocks, ddp_volumes, fsdp_volumes, mmd_volumes, rows_of

ROOT = Path(__file__).resolve().parents[2]
BATCH = 3


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_the_volumes_are_those_that_gloo_carries(tmp_path, world):
    on_ranks(communicate_on_rank, world, world, tmp_path, BATCH)
    counted = json.loads((tmp_path / "counted.json").read_text())
    model = patched("clip", fastheads.HeadConfig())
    visual = model.visual
    layers, width = len(visual.transformer.resblocks), visual.transformer.width
    trained = [p for p in visual.parameters() if p.requires_grad]
    expected = {
        "ddp": ddp_volumes(model),
        "fsdp": fsdp_volumes(visual, world),
        "fsdp adapters": fsdp_volumes(visual, world, trained),
        "mmd": mmd_volumes(layers, BATCH, width, world),
    }
    assert {name: Volumes(**found) for name, found in counted.items()} == expected
    assert all(any(asdict(volumes).values()) for volumes in expected.values())


def test_the_page_has_the_result_file_s_tables():
    results = ROOT / "bench" / "results"
    made = blocks(read_json(results / "scale.json"), read_json(results / "loading.json"))
    page = (ROOT / "docs" / "scale.md").read_text()
    for block, text in made.items():
        assert read_block(page, block) == f"{text}\n"


def test_the_result_file_is_that_of_the_code():
    made = rows_of("L/14", "hap")
    of = {(row["model"], row["method"]) for row in made}
    kept = read_json(ROOT / "bench" / "results" / "scale.json")["rows"]
    told = [row for row in kept if (row["model"], row["method"]) in of]
    assert rounded(made) == rounded(told)


def rounded(rows):
    """Python 3.12 adds up floats more exactly than 3.11."""
    return json.loads(json.dumps(rows), parse_float=lambda text: f"{float(text):.12g}")
