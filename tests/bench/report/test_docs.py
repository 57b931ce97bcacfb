"""docs/performance.md shows what the commands say, and nothing that has gone stale."""

import json
from pathlib import Path

import pytest

from bench.base import results
from bench.base.tables import read_block, table, write_block
from bench.base.towers import SHAPES
from bench.compile_report.kernels import doc_blocks, read
from bench.cpu import report as cpu_report
from bench.launches import report as launches_report
from bench.report.__main__ import stale
from bench.report.sources import sources
from bench.roofline.__main__ import all_costs, backward_table, cost_table, target_table
from bench.roofline.chips import CHIPS

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
RESULTS = ROOT / "bench" / "results"


def test_the_roofline_tables_are_those_of_the_code():
    chips = list(CHIPS.values())
    costs = all_costs(chips)
    for key, shape in SHAPES.items():
        expected = cost_table([c for c in costs if c.shape == shape.name], chips)
        assert read_block(PAGE, f"roofline {key}").strip() == expected
    assert read_block(PAGE, "roofline targets").strip() == target_table(costs, chips)
    assert read_block(PAGE, "roofline backward").strip() == backward_table(chips)


def test_the_roofline_file_is_that_of_the_code():
    written = json.loads((RESULTS / "roofline.json").read_text(encoding="utf-8"))
    again = {(c.shape, c.path): c for c in all_costs(list(CHIPS.values()))}
    assert len(written["costs"]) == len(again)
    for row in written["costs"]:
        found = again[row["shape"], row["path"]]
        assert row["saved"] == pytest.approx(found.saved)
        assert row["backward_seconds"]["H200"] == pytest.approx(found.backward_seconds["H200"])


def test_the_compile_tables_are_those_of_the_result_file():
    for name, text in doc_blocks(read(RESULTS / "compile.json")).items():
        assert read_block(PAGE, name).strip() == text.strip(), name


def test_the_cpu_table_is_that_of_the_result_file():
    _, rows = results.read(RESULTS / "cpu.json")
    assert read_block(PAGE, "cpu").strip() == cpu_report(rows)


def test_the_launches_are_those_of_the_result_file():
    _, rows = results.read(RESULTS / "launches.json")
    assert read_block(PAGE, "launches").strip() == launches_report(rows).strip()


def test_tables_figures_and_readme_are_those_of_the_result_files():
    assert stale(sources(sorted(RESULTS.glob("*.json")))) == []


def test_blocks_are_replaced_and_unknown_ones_refused(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- one -->\nold\n<!-- end -->\n<!-- two -->\nkept\n<!-- end -->\n")
    write_block(page, "one", "new \\1 text")
    assert page.read_text() == "before\n<!-- one -->\nnew \\1 text\n<!-- end -->\n<!-- two -->\nkept\n<!-- end -->\n"
    with pytest.raises(ValueError, match="no block <!-- three -->"):
        write_block(page, "three", "")


def test_tables_are_padded_and_numbers_stand_to_the_right():
    assert table(["name", "n"], [["a", 1], ["bc", 12]]) == "| name |  n |\n|------|---:|\n| a    |  1 |\n| bc   | 12 |"
