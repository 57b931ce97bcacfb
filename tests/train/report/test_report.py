"""The report: says what the record says, stands alone, survives gaps, and is replaced whole."""

import base64
import json
import math
import os
import re
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image
from records import METHODS, Page, fake_experiment, fake_run, fake_samples

from fastheads.train.experiment import table
from fastheads.train.report import figures
from fastheads.train.report.page import write_report
from fastheads.train.report.record import curve


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report on one target and one seed, with samples."""
    root = tmp_path_factory.mktemp("one")
    return write_report(fake_experiment(), root / "out", samples=fake_samples(root / "images"))


def test_page_stands_alone(one: Path) -> None:
    page = Page(one)
    assert not re.search(r"https?://|@import|url\(", page.html)
    assert not {"script", "iframe", "object", "base"} & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        assert (attributes.get("src") or "data:").startswith("data:")
        if tag == "link":
            assert attributes["href"] == "data:,"
        if tag == "a":
            assert (attributes["href"] or "").startswith("#")


def test_every_image_has_alternative_text(one: Path) -> None:
    images = [attributes for tag, attributes in Page(one).tags if tag == "img"]
    assert len(images) > 4 * 6  # the samples, and figures
    assert all(attributes.get("alt") for attributes in images)


def test_links_of_the_contents_lead_somewhere(one: Path) -> None:
    tags = Page(one).tags
    ids = {attributes.get("id") for _, attributes in tags}
    assert {(a["href"] or "")[1:] for tag, a in tags if tag == "a"} <= ids


def test_figures_are_written_and_shown(one: Path) -> None:
    written = sorted((one.parent / "figures").iterdir())
    assert {"accuracy.png", "gates-hap.png", "gates-hap-steps.png", "training-mmd.png"} <= {f.name for f in written}
    html = one.read_text(encoding="utf-8")
    for file in written:
        with Image.open(file) as image:
            assert image.size[0] == figures.WIDTH * figures.DPI
        assert base64.b64encode(file.read_bytes()).decode() in html


def test_small_samples_keep_their_pixels(one: Path, quick: None, tmp_path: Path) -> None:
    assert one.read_text(encoding="utf-8").count('class="tiny"') == 4 * 6
    large = fake_samples(tmp_path / "images", size=300)
    large["noisy"].append((tmp_path / "missing.png", "6"))
    page = Page(write_report(fake_experiment(), tmp_path / "out", samples=large))
    assert 'class="tiny"' not in page.html
    assert page.html.count("data:image/jpeg") == 4 * 6


def test_one_seed_has_binomial_errors(one: Path) -> None:
    experiment, text = fake_experiment(), Page(one).text
    for run in experiment["runs"]:
        p = run["accuracy"]["noisy"]
        assert f"{100 * p:.1f} ± {100 * math.sqrt(p * (1 - p) / 1797):.1f}" in text
    assert "binomial standard error" in text
    assert "over seeds" not in text


def test_seeds_have_standard_errors(quick: None, tmp_path: Path) -> None:
    experiment = fake_experiment(["noisy", "clean"], seeds=3)
    text = Page(write_report(experiment, tmp_path)).text
    hits = np.array(
        [
            [r["accuracy"][r["target"]] for r in experiment["runs"] if r["method"] == "lora" and r["seed"] == seed]
            for seed in range(3)
        ]
    )
    for values in (*hits.T, hits.mean(1)):  # each target, then the average over targets
        assert f"{100 * values.mean():.1f} ± {100 * values.std(ddof=1) / math.sqrt(3):.1f}" in text
    assert "standard error over 3 seeds" in text
    assert "binomial" not in text


def test_no_errors_where_the_scored_part_is_not_counted(quick: None, tmp_path: Path) -> None:
    experiment = fake_experiment()
    experiment["dataset"]["evaluation"] = "the 20 % split"
    text = Page(write_report(experiment, tmp_path)).text
    assert "No error bars" in text and "±" not in text
    assert "this part of the target's images: the 20 % split" in text


def test_headline_follows_the_numbers(quick: None, tmp_path: Path) -> None:
    experiment = fake_experiment()
    for run in experiment["runs"]:
        run["accuracy"]["noisy"] = {"zero-shot": 0.8, "lora": 0.7, "dig": 0.75}.get(run["method"], 0.6)
    text = Page(write_report(experiment, tmp_path)).text
    assert "Zero-shot CLIP got 80.0 ± 0.9 %, and no trained method did better; DIG came closest with 75.0" in text
    assert "too close to call" not in text


def test_headline_admits_what_errors_cannot_tell_apart(quick: None, tmp_path: Path) -> None:
    experiment = fake_experiment()
    for run in experiment["runs"]:
        run["accuracy"]["noisy"] = {"zero-shot": 0.5, "lora": 0.71, "hap": 0.7}.get(run["method"], 0.4)
    text = Page(write_report(experiment, tmp_path)).text
    assert "LoRA did best with 71.0 ± 1.1 %, 21.0 points above it" in text
    assert "too close to call: HA-LoRA + DIG + MMD." in text
    assert "Below zero-shot: Linear probe, Fine-tuning, CAR-FT, HA-LoRA, DIG." in text


def test_methods_with_one_accuracy_share_a_place(quick: None, tmp_path: Path) -> None:
    experiment = fake_experiment()
    for run in experiment["runs"]:
        run["accuracy"]["noisy"] = 0.6 if run["method"] == "lora" else 0.5
    text = Page(write_report(experiment, tmp_path)).text
    assert text.count("place 2 of 8") == 2 and "place 1 of 8" in text  # zero-shot's tile and HAP's
    gains, robustness = text.split("Effective robustness")
    assert gains.count("+0.0") == 6 and gains.count("+10.0") == 1
    assert robustness.count("+0.0") == 7 and robustness.count("+10.0") == 1  # the baselines' line is level


def test_names_are_escaped(quick: None, tmp_path: Path) -> None:
    evil = "<script>alert('$x$ & \"y\"')</script>"
    experiment = json.loads(json.dumps(fake_experiment()).replace("noisy", json.dumps(evil)[1:-1]))
    experiment |= {"title": evil, "command": evil, "device": evil, "commit": evil, "limits": [evil]}
    experiment["runs"] = [run for run in experiment["runs"] if run["method"] in ("zero-shot", "hap")]
    experiment["methods"] = [{"id": "zero-shot", "label": evil, "description": evil}, {"id": "hap", "label": evil}]
    page = Page(write_report(experiment, tmp_path))
    assert "<script" not in page.html
    assert page.text.count(evil) >= 10


@pytest.mark.parametrize("gone", ["methods", "dataset", "model", "versions", "tuning", "limits", "command"])
def test_parts_of_the_record_may_be_missing(quick: None, tmp_path: Path, gone: str) -> None:
    experiment = fake_experiment()
    del experiment[gone]
    assert write_report(experiment, tmp_path).is_file()


def test_parts_of_the_runs_may_be_missing(tmp_path: Path) -> None:
    bare = {"method": "unheard-of", "target": "noisy", "accuracy": {"noisy": 0.25}}
    page = Page(write_report({"runs": [bare]}, tmp_path))
    assert "25.0" in page.text
    for note in ("No gates were recorded", "No history was kept", "The merge was not checked", "No sizes"):
        assert note in page.text


def test_numbers_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    run = fake_run("hap", "noisy", 0)
    run["history"]["mmd"][:5] = [None, float("nan"), float("inf"), None, None]
    run["history"]["loss"] = [None] * 300
    run["history"]["validation"] = [[300, 0.7]]
    run |= {"gates": None, "seconds": float("nan"), "images_per_second": None, "trainable_parameters": None}
    run |= {"saved_bytes": None, "sources": []}
    page = Page(write_report({"runs": [run]}, tmp_path))
    assert "nan" not in page.text.split()
    assert {f.name for f in (tmp_path / "figures").glob("training-*")} == {
        "training-cross_entropy.png", "training-mmd.png", "training-validation.png", "training-target.png",
        "training-context_accuracy.png", "training-context_change.png",
    }  # fmt: skip


def test_a_method_without_all_targets_has_no_average(quick: None, tmp_path: Path) -> None:
    experiment = fake_experiment(["noisy", "clean"], seeds=2)
    experiment["runs"] = [r for r in experiment["runs"] if (r["method"], r["target"]) != ("lora", "clean")]
    text = Page(write_report(experiment, tmp_path)).text
    order = text.split("In order, in per cent: ")[1].split("runs")[0]
    assert "HA-LoRA" in order and " LoRA " not in order


def test_curves_end_where_their_run_ended() -> None:
    short, long = {"step": [1, 2], "loss": [4.0, 2.0]}, {"step": [1, 2, 3], "loss": [2.0, 2.0, 1.0]}
    found = curve([{"history": short}, {"history": long}], "loss")
    assert found is not None
    np.testing.assert_allclose(found[0], [1, 2, 3])
    np.testing.assert_allclose(found[1], [3.0, 2.0, 1.0])


def test_gates_of_one_step_are_painted() -> None:
    grid = np.full((1, 12), 1.0)
    norm = figures.gate_norm([grid])
    assert figures.gate_history({7: grid}, title="HAP", norm=norm).startswith(b"\x89PNG")
    assert figures.gate_map(grid, title="HAP", norm=norm).startswith(b"\x89PNG")


def test_gate_colours_are_centred_on_one() -> None:
    for gates in (np.ones((2, 3)), np.array([[0.01, 3.9]]), np.array([[0.98, 1.02]]), np.array([[0.0, 1.2]])):
        norm = figures.gate_norm([gates])
        assert norm(1.0) == 0.5
        assert 0.0 <= norm(gates.min()) <= norm(gates.max()) <= 1.0


def test_a_method_keeps_its_colour() -> None:
    colours = [figures.colour(name, ["new", *METHODS]) for name in [*METHODS, "new"]]
    assert len(set(colours)) == len(colours)
    assert figures.colour("hap", ["hap"]) == figures.colour("hap", [*METHODS])


def test_empty_runs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="experiment"):
        write_report({"title": "nothing", "runs": []}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_kill_leaves_the_old_report(quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = write_report(fake_experiment(), tmp_path).read_bytes()

    def killed(source: str, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_report(fake_experiment() | {"title": "new"}, tmp_path)
    assert (tmp_path / "report.html").read_bytes() == before
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".")]


def test_painting_takes_any_name_and_leaves_matplotlib_as_it_was() -> None:
    before = dict(matplotlib.rcParams)
    name = r"a $\frac$ <b> {c} % _"  # neither TeX nor mark-up
    figures.bars([figures.Bar(name, 1.0, "#000000", "1", 0.1)], title=name, unit="%")
    assert dict(matplotlib.rcParams) == before


def test_numbers_are_printed_with_their_units() -> None:
    assert [figures.size(n) for n in (950, 37_828, 4_821_004)] == ["950 B", "37.8 kB", "4.82 MB"]
    assert [figures.percent(part, 1e4) for part in (1e4, 1996, 64.4, 0.3)] == ["100 %", "20 %", "0.64 %", "< 0.01 %"]
    seconds = (0.84, 9.96, 59.7, 184.0, 4330.0)
    assert [figures.duration(s) for s in seconds] == ["0.8 s", "10 s", "1 min 0 s", "3 min 4 s", "1 h 12 min"]


def test_the_text_table_fits_its_longest_label() -> None:
    experiment = fake_experiment(["noisy", "clean"])
    experiment["methods"][-1]["label"] = "a label that is longer than all the others"
    assert len({len(line) for line in table(experiment).split("\n")}) == 1
