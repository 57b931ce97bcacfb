"""Accuracy in and out of distribution: the line of the baselines, what lies above it, and that page and CSV say so."""

import csv

import numpy as np
import pytest
from records import Page, fake_experiment

from fastheads.train.report.page import write_report
from fastheads.train.report.robustness import Point, baseline, effective
from fastheads.train.report.sections import Page as Sections


def logits(p):
    return np.log(p) - np.log1p(-p)


def test_the_line_is_that_of_least_squares_in_logits():
    rng = np.random.default_rng(0)
    source, target = rng.uniform(0.3, 0.9, (2, 7))
    line = baseline([Point("", 0, *pair) for pair in zip(source, target, strict=True)])
    slope, intercept = np.polyfit(logits(source), logits(target), 1)
    assert (line.slope, line.intercept, line.points) == (pytest.approx(slope), pytest.approx(intercept), 7)


def test_effective_robustness_is_what_lies_above_the_line():
    on = [Point("", 0, source, 1 / (1 + ((1 - source) / source) ** 0.5)) for source in (0.2, 0.5, 0.9)]
    line = baseline(on)  # logit(target) = logit(source) / 2
    assert [effective(point, line) for point in on] == pytest.approx([0, 0, 0], abs=1e-9)
    assert effective(Point("", 0, 0.8, 0.7), line) == pytest.approx(100 * (0.7 - 2 / 3))
    assert np.isfinite(line.expected(1.0)) and np.isfinite(line.expected(0.0))


@pytest.mark.parametrize("few", [[], [Point("", 0, 0.5, 0.4)], [Point("", 0, 0.5, 0.4), Point("", 0, 0.5, 0.6)]])
def test_there_is_no_line_through_fewer_than_two_points(few):
    assert baseline(few) is None and effective(Point("", 0, 0.8, 0.7), baseline(few)) is None


def test_page_and_csv_say_the_same_of_each_method(tmp_path):
    found = fake_experiment(["noisy", "rotated"], seeds=2)
    shown = Sections(found)
    rows = list(csv.DictReader(shown.csv().splitlines()))
    text = Page(write_report(found, tmp_path)).text
    assert shown.baselines() == ["zero-shot", "linear-probe", "fine-tune"] and "6 on noisy, slope" in text
    assert "recorded for the curves, and nothing follows it" in text
    for name in ("in-and-out-0", "in-and-out-1", "training-context_accuracy", "training-context_change"):
        assert (tmp_path / f"figures/{name}.png").read_bytes().startswith(b"\x89PNG")
    for target in ("noisy", "rotated"):
        runs = [r for r in found["runs"] if r["target"] == target]
        xy = np.array(
            [
                (np.mean([r["accuracy"][d] for d in r["sources"]]), r["accuracy"][target])
                for r in runs
                if r["method"] in ("zero-shot", "linear-probe", "fine-tune")
            ]
        )
        slope, intercept = np.polyfit(*logits(xy).T, 1)
        mine = [r for r in rows if (r["method"], r["target"], r["than"]) == ("hap", target, "")]
        assert [(r["over"], r["at"]) for r in mine if r["over"] == "alpha"] == [("alpha", a) for a in ("0", "0.5", "1")]
        assert len([r for r in mine if r["over"] == "step"]) == 12
        for row in mine:
            source, accuracy = float(row["source"]) / 100, float(row["mean"]) / 100
            gained = 100 * (accuracy - 1 / (1 + np.exp(-slope * logits(source) - intercept)))
            assert float(row["effective"]) == pytest.approx(gained, abs=1e-2)
        (kept,) = (float(row["effective"]) for row in mine if not row["over"])
        assert f"{kept:+.1f}".replace("-", "−") in text


def test_without_baselines_it_is_refused_in_words(tmp_path):
    found = fake_experiment()
    found["runs"] = [run for run in found["runs"] if run["method"] in ("zero-shot", "hap")]
    assert "No effective robustness: it takes two or more runs" in Page(write_report(found, tmp_path)).text
    assert all(not row["effective"] for row in csv.DictReader(Sections(found).csv().splitlines()))
