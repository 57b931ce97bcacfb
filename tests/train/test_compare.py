"""Runs side by side: which are one row, what their differences are, and what the page, CSV and LaTeX say."""

import csv
import json
import math

import numpy as np
import pytest
from records import Page, unpainted

from fastheads.train.compare import compare
from fastheads.train.report import sections
from fastheads.train.report.comparison import published
from fastheads.train.report.page import write_report

IMAGES, TARGETS = 40, ("art", "sketch")


def answers(method, target, seed):
    """Right or wrong for each image, as if some images were hard for everybody."""
    rng = np.random.default_rng([sum(map(ord, method)), len(target), seed])
    hard = np.random.default_rng(len(target)).uniform(0.2, 0.9, IMAGES)
    return (rng.uniform(size=IMAGES) < hard).astype(int)


def write(folder, method, seeds=(0, 1), targets=TARGETS, tag="", **recipe):
    """Runs as train leaves them; tag: of the answers."""
    for target in targets:
        for seed in seeds:
            right = answers(method + tag, target, seed)
            home = folder / target / f"seed{seed}" / method
            home.mkdir(parents=True)
            run = {
                "method": method, "target": target, "seed": seed, "sources": ["photo"], "seconds": 1.0,
                "peak_memory_mb": 100.0, "trainable_parameters": 4, "accuracy": {"photo": 0.9, target: right.mean()},
            }  # fmt: skip
            key = {"method": method, "target": target, "weights": "w", "recipe": {"seed": seed, **recipe}}
            (home / "result.json").write_text(json.dumps({"key": key, "run": run}))
            kept = {"labels": [0] * IMAGES, "answers": (1 - right).tolist(), "confidence": [0.5] * IMAGES}
            (home / "answers.json").write_text(json.dumps(kept))
    return folder


@pytest.fixture
def folders(tmp_path):
    """HAP with two values of lambda, each beside the same zero-shot."""
    for weight in (0.1, 10.0):
        folder = write(tmp_path / f"lambda{weight:g}", "hap", tag=str(weight), lr=1e-3, mmd_weight=weight)
        write(folder, "zero-shot")
    return [tmp_path / "lambda0.1", tmp_path / "lambda10"]


def test_rows_are_told_apart_by_what_they_differ_in(folders):
    found = compare(folders, "")
    assert [m["id"] for m in found["methods"]] == ["hap, mmd_weight 0.1", "zero-shot", "hap, mmd_weight 10.0"]
    assert len(found["runs"]) == 3 * 4  # zero-shot's are the same in both folders
    (curve,) = found["curves"]
    assert curve["setting"] == "mmd_weight"
    assert curve["lines"] == {"hap": [(0.1, "hap, mmd_weight 0.1"), (10.0, "hap, mmd_weight 10.0")]}


def test_seeds_in_another_folder_are_more_of_a_row(tmp_path):
    one = write(tmp_path / "one", "hap", seeds=(0,), lr=1e-3)
    two = write(tmp_path / "two", "hap", seeds=(1,), lr=1e-3)
    found = compare([one, two], "")
    assert [m["id"] for m in found["methods"]] == ["hap"] and {run["seed"] for run in found["runs"]} == {0, 1}


def test_a_search_is_no_run_and_a_folder_without_runs_is_refused(tmp_path, folders):
    write(folders[0] / "art/seed0/search/x", "lora")
    assert "lora" not in {m["id"] for m in compare(folders, "")["methods"]}
    with pytest.raises(ValueError, match="nothing: no run in it"):
        compare([tmp_path / "nothing"], "")


def test_differences_are_paired_by_image_and_seed(folders):
    found = compare(folders, "")["differences"]
    mine, other = "hap, mmd_weight 10.0", "zero-shot"
    by_target = {e["target"]: e for e in found if (e["method"], e["than"]) == (mine, other)}
    assert list(by_target) == ["art", "sketch", "average"]
    means, errors, seeds = [], [], np.zeros((2, 2))
    for t, target in enumerate(TARGETS):
        gaps = np.zeros(IMAGES)
        for seed in (0, 1):
            gap = answers("hap10.0", target, seed) - answers("zero-shot", target, seed)
            gaps += gap / 2
            seeds[t, seed] = 100 * gap.sum() / IMAGES
        spread = sum((gap - gaps.sum() / IMAGES) ** 2 for gap in gaps) / (IMAGES - 1)
        means.append(100 * gaps.sum() / IMAGES)
        errors.append(100 * math.sqrt(spread / IMAGES))
        assert by_target[target]["mean"] == pytest.approx(means[-1])
        assert by_target[target]["error"] == pytest.approx(errors[-1])
        assert by_target[target]["seeds_error"] == pytest.approx(abs(seeds[t, 0] - seeds[t, 1]) / 2)
    average = by_target["average"]
    assert average["mean"] == pytest.approx(sum(means) / 2)
    assert average["error"] == pytest.approx(math.sqrt(errors[0] ** 2 + errors[1] ** 2) / 2)
    assert average["seeds_error"] == pytest.approx(abs(seeds[:, 0].mean() - seeds[:, 1].mean()) / 2)


def test_page_csv_and_latex_say_the_same(folders, tmp_path, monkeypatch):
    unpainted(monkeypatch)
    found = compare(folders, "fastheads report")
    shown = sections.Page(found)
    page = Page(write_report(found, tmp_path / "out"))
    rows = list(csv.DictReader(shown.csv().splitlines()))
    assert {row["target"] for row in rows} == {*TARGETS, "average"}
    for row in rows:
        if not row["than"]:
            score = (
                shown.score(row["method"], row["target"]) if row["target"] in TARGETS else shown.average(row["method"])
            )
            assert float(row["mean"]) == pytest.approx(score.mean, abs=1e-3) and str(score) in page.text
            tex = str(score).replace("±", r"\pm")
            assert f"${tex}$" in shown.latex()
        elif row["target"] == "average":
            assert f"{abs(float(row['mean'])):.1f} ± {float(row['error']):.1f}" in page.text
    assert r"hap, mmd\_weight 10.0" in shown.latex() and "published" not in shown.latex()


def test_accuracy_over_a_setting_is_painted(folders):
    page = sections.Page(compare(folders, ""))
    html = page.curves()
    assert page.pictures["over-mmd_weight"].startswith(b"\x89PNG")
    for value in ("0.1", "10"):
        assert f"{value}: {page.average(f'hap, mmd_weight {float(value)}')}" in html


def test_published_numbers_stand_apart(folders, tmp_path, monkeypatch):
    unpainted(monkeypatch)
    found = compare(folders, "")
    assert "Published" not in Page(write_report(found, tmp_path / "other")).text
    found["dataset"] = {"name": "PACS"}
    text = Page(write_report(found, tmp_path / "pacs")).text
    assert "Published for PACS with CLIP's ViT-B/16" in text and "Not run here" in text
    *_, row = sections.Page(found).latex().split("CLIPood")
    assert row.splitlines()[0] == r" (published: CAR-FT, arXiv 2211.16175, ViT-B/16) & -- & -- & $97.3$ \\"
    assert ("CLIPood", 97.3, "CAR-FT, arXiv 2211.16175") in published("PACS")
    assert ("HA-LoRA + DIG", 61.1, "HAP, arXiv 2412.07226") in published("DomainNet")
    assert {method for method, *_ in published("TerraIncognita")} == {
        "Zero-shot CLIP", "Linear probe", "MIRO", "CLIPood", "CAR-FT",
    }  # fmt: skip
