"""The generated page: wins and losses as the rows have them, machines apart, nothing stale."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bench.base import results
from bench.base.results import Row
from bench.base.towers import SETTINGS
from bench.report.__main__ import stale, write
from bench.report.figures import all_figures, figure_of
from bench.report.performance_page import NO_GPU, answer, cases_table, measured, readme, wins_and_losses
from bench.report.sources import Source, one_machine, roofline_shares, sources
from bench.roofline.chips import CHIPS
from bench.roofline.costs import cost

CPU = {
    "device": "A CPU", "capability": None, "threads": 2, "python": "3.11", "versions": {"torch": "2.11"},
    "commit": "0123456789abcdef", "changed": False, "date": "2026-11-25T10:00:00+00:00", "load": [0.1, 0.1, 0.1],
}  # fmt: skip
H100 = {**CPU, "device": "NVIDIA H100 80GB HBM3", "capability": [9, 0], "driver": {"driver_version": "570"}}
EXTRA = {"setting": "B/16", "batch": 256, "tokens": 197, "precision": "amp", "ranks": [2]}


def row(name: str, ratio: float | None, group: str = "block", case: str = "ViT-B/16", **fields) -> Row:
    values = {"seconds": {"median": ratio * 2e-3}, "ratio": ratio, "baseline": "stock"} if ratio else {}
    return Row(group, case, name, **{**values, "extra": EXTRA, **fields})


def cpu_rows() -> tuple[Row, ...]:
    return (
        row("stock", 1.0, peak_bytes=100),
        row("cpu", 0.8, peak_bytes=50),
        row("plain", 1.6, peak_bytes=200),
        row("factored", 0.6, peak_bytes=40),
        row("peft", 2.4, status="wrong", why="features are off by 0.03"),
        row("xformers", None, status="not run", why="xformers is not installed"),
    )


def source(environment=CPU, rows=None, name="cpu.json") -> Source:
    return Source(name, environment, cpu_rows() if rows is None else rows)


def file_of(folder: Path, name: str, environment: dict, rows, **more) -> Path:
    results.write(folder / name, environment, rows)
    content = json.loads((folder / name).read_text()) | more
    (folder / name).write_text(json.dumps(content))
    return folder / name


def test_wins_and_losses_stand_side_by_side():
    text = wins_and_losses([source()])
    wins, losses = text.split("Where the other is faster")
    assert "4 comparisons: ours is faster in 3, the other in 1." in wins
    assert wins.index("3.00 ×") < wins.index("2.00 ×") < wins.index("1.25 ×")
    assert "(its numbers are wrong)" in wins
    assert "factored through cuBLAS" in losses and "1.33 ×" in losses and "1.25" in losses
    assert "plain" not in losses


def test_without_a_loss_the_page_says_that_there_is_none():
    rows = tuple(r for r in cpu_rows() if r.contender != "factored")
    assert "No other is faster in any case that was measured." in wins_and_losses([source(rows=rows)])


def test_what_is_wrong_or_did_not_run_stands_in_the_table_with_its_reason():
    text = measured([source()])
    assert "**wrong: features are off by 0.03**" in text
    assert "not run: xformers is not installed" in text
    assert "A CPU, 2 threads, load average 0.1; commit 0123456789, 2026-11-25; `cpu.json`" in text


def test_machines_are_not_mixed():
    both = [source(), source(H100, name="h100.json")]
    with pytest.raises(ValueError, match="cpu.json was measured on A CPU, 2 threads, h100.json on NVIDIA H100"):
        one_machine(both, "a table")
    with pytest.raises(ValueError, match="do not go into one table"):
        figure_of(both, "block")
    with pytest.raises(ValueError, match="wins and losses"):
        wins_and_losses(both)
    text = answer(both)
    assert text.index("### On NVIDIA H100") < text.index("### On A CPU")


def test_without_a_gpus_rows_the_page_says_so_first():
    assert answer([source()]).startswith(NO_GPU)
    assert NO_GPU not in answer([source(H100)])
    assert answer([]).startswith(NO_GPU)


def test_two_files_on_the_same_case_are_refused(tmp_path):
    files = [file_of(tmp_path, name, CPU, cpu_rows()) for name in ("one.json", "two.json")]
    with pytest.raises(ValueError, match="one.json and two.json both have block: ViT-B/16 of A CPU, 2 threads"):
        sources(files)
    assert len(sources(files[:1])) == 1


def test_a_rehearsals_numbers_are_refused_and_other_files_passed_over(tmp_path):
    (tmp_path / "roofline.json").write_text('{"chips": {}, "costs": []}')
    (tmp_path / "old.json").write_text('{"environment": {}, "rows": [{"kind": "training"}]}')
    assert sources(sorted(tmp_path.glob("*.json"))) == []
    with pytest.raises(ValueError, match="a rehearsal's numbers mean nothing"):
        sources([file_of(tmp_path, "gpu.json", H100, cpu_rows(), rehearsal=True)])


def test_a_sweep_shows_the_largest_batch_and_what_ended_it():
    def at(x: float, per_second: float, **extra) -> Row:
        return row("auto", 1.0, "batch sweep", "ViT-B/32", x=x, per_second=per_second, extra={**EXTRA, **extra})

    last = at(32, 91.5, largest=True, ended="a step would take 9 GB, of 8 GB")
    rows = (at(8, 70.25), last, row("plain", None, "batch sweep", "ViT-B/32", status="not run", why="no time", x=8))
    text = measured([source(rows=rows)])
    assert "auto: largest batch 32, 91.5 images/s; a step would take 9 GB, of 8 GB" in text
    assert "plain: not run, no time (batch 8)" in text
    (panel,) = figure_of([source(rows=rows)], "batch sweep").panels
    assert panel.lines == (("auto", (8, 32), (70.25, 91.5)),)


def test_the_fraction_of_the_roofline_is_that_of_the_model():
    ranks = SETTINGS["B/16"].ranks()
    shape = SETTINGS["B/16"].shape(256)
    rows = tuple(row("stacked", 1.0, extra={**EXTRA, "ranks": [r]}, case=f"rank {r}") for r in (2, 8))
    found = {r.extra["ranks"][0]: (peak, reached) for r, peak, reached in roofline_shares([source(H100, rows)])}
    model = cost("stacked", shape, [CHIPS["H100"]])
    mean = [sum(found[r][i] for r in ranks) / len(ranks) * 2e-3 for i in (0, 1)]
    assert mean == pytest.approx([model.seconds("H100", False), model.seconds("H100", True)])
    assert roofline_shares([source(rows=rows)]) == []


def test_the_readme_counts_the_cases_where_another_is_faster():
    assert "in 1 of 4 comparisons the other is faster" in readme([source()])
    assert "factored through cuBLAS, unsloth's way: 0.75 ×" in cases_table([source()])


@pytest.fixture
def root(tmp_path):
    (tmp_path / "docs").mkdir()
    page = "".join(f"<!-- report {name} -->\n<!-- end -->\n" for name in ("answer", "cases", "measured"))
    (tmp_path / "docs" / "performance.md").write_text(page)
    (tmp_path / "README.md").write_text("<!-- report -->\n<!-- end -->\n")
    return tmp_path


def test_what_was_changed_by_hand_or_is_of_older_rows_is_named(root):
    found = [source()]
    assert len(stale(found, root)) == 4 + len(all_figures(found))
    write(found, root)
    assert stale(found, root) == []
    page = root / "docs" / "performance.md"
    page.write_text(page.read_text().replace("3.00 ×", "3.50 ×"))
    assert stale(found, root) == ["docs/performance.md: the block 'report answer'"]
    newer = [source(rows=tuple(replace(r, ratio=r.ratio and r.ratio * 1.1) for r in cpu_rows()))]
    assert any(line.startswith("docs/results/") for line in stale(newer, root))
