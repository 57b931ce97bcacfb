"""What the report says of the answers: errors by class, gains, changed images, classes, calibration, plain steps."""

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from records import DOMAINS, Page, fake_experiment, fake_samples, with_answers

from fastheads.train.report import answer_figures, figures
from fastheads.train.report.clusters import ByClass, clustered_error
from fastheads.train.report.page import write_report
from fastheads.train.report.record import Changed, Record, Score

PARTS = ("by_class", "confusions", "calibration")


def counted(**methods: Any) -> dict[str, Any]:
    """A record of `methods`: per held-out domain, right answers by class of 10 images; one seed or a list."""
    runs = []
    for method, targets in methods.items():
        for target, seeds in targets.items():
            for seed, right in enumerate(seeds if np.ndim(seeds) > 1 else [seeds]):
                images = [10] * len(right)
                accuracy = {target: sum(right) / sum(images)}
                by_class = {"images": images, "right": list(right)}
                runs.append(
                    {"method": method.replace("_", "-"), "target": target, "seed": seed, "accuracy": accuracy}
                    | {"by_class": by_class}
                )
    return {"runs": runs, "dataset": {"errors": "class"}}


def bootstrap(values: np.ndarray, images: np.ndarray, draws: int = 20_000) -> float:
    """The spread of mean over targets of Σ value / Σ images, `[T, C]` each, over classes drawn with replacement."""
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, values.shape[1], (draws, values.shape[1]))
    means = values[:, drawn].sum(-1) / images[:, drawn].sum(-1)
    return float(means.mean(0).std(ddof=1))


def many_classes(targets: int = 2, classes: int = 150) -> tuple[list[ByClass], np.ndarray, np.ndarray]:
    """Classes of 2 to 40 images that are easy or hard on every target alike."""
    rng = np.random.default_rng(3)
    images = rng.integers(2, 41, (targets, classes))
    right = rng.binomial(images, rng.beta(2, 2, classes))
    parts = [ByClass(n.astype(float), r.astype(float)) for n, r in zip(images, right, strict=True)]
    return parts, right.astype(float), images.astype(float)


def test_an_error_by_class_made_by_hand() -> None:
    # Two classes of 10 images, 9 and 5 right: p = 0.7, parts (9 − 7) / 20 and (5 − 7) / 20.
    score = Record(counted(hap={"noisy": [9, 5]})).ranked["hap"]
    assert score.mean == pytest.approx(70.0)
    assert score.error == pytest.approx(100 * math.sqrt(2 * (0.1**2 + 0.1**2)))


def test_a_class_is_drawn_on_all_targets_at_once() -> None:
    # What a class gives on one target it takes on the other: their mean is the same whatever classes are drawn.
    opposed = Record(counted(hap={"clean": [5, 9], "noisy": [9, 5]})).ranked["hap"]
    alike = Record(counted(hap={"clean": [9, 5], "noisy": [9, 5]})).ranked["hap"]
    assert opposed.error == pytest.approx(0.0, abs=1e-9)
    assert alike.error == pytest.approx(20.0)


@pytest.mark.parametrize("targets", [1, 2])
def test_the_error_is_that_of_a_bootstrap_over_classes(targets: int) -> None:
    parts, right, images = many_classes(targets)
    assert clustered_error(parts) == pytest.approx(bootstrap(right, images), rel=0.05)


def test_the_error_is_that_of_a_jackknife_over_classes() -> None:
    parts, right, images = many_classes()
    left = [np.delete(right, c, 1).sum(1) / np.delete(images, c, 1).sum(1) for c in range(right.shape[1])]
    means = np.mean(left, axis=1)
    jackknife = math.sqrt((len(means) - 1) / len(means) * ((means - means.mean()) ** 2).sum())
    assert clustered_error(parts) == pytest.approx(jackknife, rel=0.03)


def test_targets_count_alike_however_many_images_they_have() -> None:
    few, many = ByClass(np.array([2.0, 2.0]), np.array([2.0, 0.0])), ByClass(np.array([50.0] * 2), np.array([25.0] * 2))
    # The first target's parts are (2 − 1) / 4 and (0 − 1) / 4, halved by the mean; the second's are 0.
    assert clustered_error([few, many]) == pytest.approx(math.sqrt(2 * 2 * 0.125**2))


def test_a_class_without_images_is_not_counted() -> None:
    with_empty = ByClass(np.array([10.0, 10.0, 0.0]), np.array([9.0, 5.0, 0.0]))
    assert clustered_error([with_empty]) == clustered_error([ByClass(with_empty.images[:2], with_empty.right[:2])])
    assert clustered_error([ByClass(np.array([10.0]), np.array([5.0]))]) is None


def test_a_gain_is_paired_by_class() -> None:
    # The classes lie far apart, and the method gets one or two more right in each: (1, 2) of 10.
    record = Record(counted(zero_shot={"noisy": [1, 7]}, hap={"noisy": [2, 9]}))
    gain = record.gain("hap")
    assert gain is not None and gain.mean == pytest.approx(15.0)
    assert gain.error == pytest.approx(100 * math.sqrt(2 * (0.025**2 + 0.025**2)))
    assert gain.clear and not Score(15.0, record.ranked["hap"].error).clear


def test_a_gain_is_that_of_a_bootstrap_over_classes() -> None:
    rng = np.random.default_rng(5)
    p = rng.beta(2, 2, 150)
    before, after = rng.binomial(10, p, (2, 150)), rng.binomial(10, np.sqrt(p), (2, 150))
    targets = ("clean", "noisy")
    record = Record(
        counted(zero_shot=dict(zip(targets, before, strict=True)), hap=dict(zip(targets, after, strict=True)))
    )
    gain = record.gain("hap")
    assert gain is not None and gain.error is not None
    assert gain.error / 100 == pytest.approx(bootstrap(after - before, np.full((2, 150), 10.0)), rel=0.05)


def test_right_answers_are_averaged_over_seeds_first() -> None:
    record = Record(counted(hap={"noisy": [[10, 4], [8, 6]]}))
    assert record.ranked["hap"].error == Record(counted(hap={"noisy": [9, 5]})).ranked["hap"].error
    assert "averaged over 2 seeds first" in record.error_kind()


def test_the_table_gives_a_gain_its_paired_error(quick: None, tmp_path: Path) -> None:
    experiment = counted(zero_shot={"noisy": [1, 7]}, hap={"noisy": [2, 9]})
    assert "hap55.0 ± 35.0+15.0 ± 5.0" in Page(write_report(experiment, tmp_path)).text


def test_without_counts_by_class_errors_are_not_paired() -> None:
    experiment = fake_experiment()
    gain = Record(experiment).gain("hap")
    p, q = (run["accuracy"]["noisy"] for run in experiment["runs"] if run["method"] in ("zero-shot", "hap"))
    assert gain is not None and gain.mean == pytest.approx(100 * (q - p))
    assert gain.error == pytest.approx(100 * math.sqrt((p * (1 - p) + q * (1 - q)) / 1797))


def test_errors_are_by_class_only_where_the_record_says_so() -> None:
    experiment = with_answers(fake_experiment())
    assert "clustered by class" in Record(experiment).error_kind()
    del experiment["dataset"]["errors"]
    assert "binomial" in Record(experiment).error_kind()


def test_an_error_from_few_classes_is_called_rough() -> None:
    few, many = (Record(with_answers(fake_experiment(), classes)).error_kind() for classes in (10, 30))
    assert "counts the 10 classes" in few and "the error itself is rough" in few
    assert "counts the 30 classes" in many and "rough" not in many


def test_a_method_without_counts_is_named_where_errors_are_by_class() -> None:
    experiment = with_answers(fake_experiment())
    next(run for run in experiment["runs"] if run["method"] == "linear-probe")["by_class"] = None
    record = Record(experiment)
    assert record.error_kind().endswith("not clustered: Linear probe.")
    p, images = record.ranked["linear-probe"].mean / 100, 300
    assert record.ranked["linear-probe"].error == pytest.approx(100 * math.sqrt(p * (1 - p) / images))


def opening(tmp_path: Path, **accuracy: float) -> str:
    """What the page says before its tiles, for one held-out domain of 1,797 images."""
    experiment = fake_experiment()
    for run in experiment["runs"]:
        run["accuracy"]["noisy"] = accuracy.get(run["method"].replace("-", "_"), 0.4)
    text = Page(write_report(experiment, tmp_path)).text
    return text.split("Better on pictures")[1].split("runs ·")[0]


def test_the_opening_says_yes_only_where_chance_is_ruled_out(quick: None, tmp_path: Path) -> None:
    sure = opening(tmp_path, zero_shot=0.5, hap=0.7, ha_lora=0.6)
    assert "Yes. The best adapter, HA-LoRA + DIG + MMD, is 20.0 ± 1.6 points above zero-shot CLIP. That is more" in sure
    assert "anything? Yes. HA-LoRA + DIG + MMD is 10.0 ± 1.6 points above HA-LoRA, which has neither." in sure
    assert "luck" not in sure
    near = opening(tmp_path, zero_shot=0.5, hap=0.51, ha_lora=0.505)
    assert (
        "Not shown. The best adapter, HA-LoRA + DIG + MMD, is 1.0 ± 1.7 points above zero-shot CLIP. That is within"
        in near
    )
    assert "anything? Not shown. HA-LoRA + DIG + MMD is 0.5 ± 1.7 points above HA-LoRA" in near
    # 1.5 standard errors are not enough.
    closer = opening(tmp_path, zero_shot=0.5, hap=0.525)
    assert "Not shown. The best adapter, HA-LoRA + DIG + MMD, is 2.5 ± 1.7 points above zero-shot CLIP." in closer


def test_the_opening_says_where_nothing_helps(quick: None, tmp_path: Path) -> None:
    said = opening(tmp_path, zero_shot=0.8, hap=0.5, ha_lora=0.6)
    assert "No. The best adapter, HA-LoRA, is 20.0 ± 1.5 points below zero-shot CLIP." in said
    assert "HA-LoRA + DIG + MMD is 30.0 ± 1.5 points below zero-shot CLIP." in said
    assert "anything? No. HA-LoRA + DIG + MMD is 10.0 ± 1.7 points below HA-LoRA" in said
    assert "Here they cost accuracy." in said


def test_the_opening_admits_that_the_best_of_several_was_lucky(quick: None, tmp_path: Path) -> None:
    said = opening(tmp_path, zero_shot=0.5, lora=0.7, hap=0.6)
    assert "The best adapter, LoRA, is 20.0 ± 1.6 points above" in said
    assert "best of 4 by these very scores, so part of its lead is luck." in said


def test_the_opening_says_what_it_costs(quick: None, tmp_path: Path) -> None:
    said = opening(tmp_path)
    assert "trains 9,232 numbers, 0.77 % of the model's 1,203,457." in said
    assert "costs nothing extra at inference" in said and "plain PyTorch" not in said
    text = Page(write_report(with_answers(fake_experiment()), tmp_path)).text
    assert "A training step takes 50 ms, and in plain PyTorch 40 ms." in text


def test_the_opening_claims_no_merge_that_was_not_checked(quick: None, tmp_path: Path) -> None:
    experiment = fake_experiment()
    for run in experiment["runs"]:
        run["merge_max_difference"] = None
    assert "Merged into the weights" not in Page(write_report(experiment, tmp_path)).text


def test_without_errors_the_opening_says_so(quick: None, tmp_path: Path) -> None:
    experiment = fake_experiment()
    experiment["dataset"]["evaluation"] = "a part"
    text = Page(write_report(experiment, tmp_path)).text
    assert "It seems so. The best adapter" in text and "zero-shot CLIP; how sure that is, is not known." in text


def images(folder: Path, count: int, before: str, after: str) -> list[Changed]:
    """Images of class "a", `before` and `after` answered."""
    folder.mkdir(parents=True)
    for at in range(count):
        Image.new("L", (8, 8), 20 * at).save(folder / f"{at}.png")
    return [Changed(folder / f"{at}.png", "a", before, after) for at in range(count)]


def test_images_that_turned_right_or_wrong_are_shown(quick: None, tmp_path: Path) -> None:
    better, worse = images(tmp_path / "better", 11, "<b>", "a"), images(tmp_path / "worse", 3, "a", "c")
    other = images(tmp_path / "other", 2, "b", "c")
    same = images(tmp_path / "same", 1, "a", "a")  # no change at all
    gone = [Changed(tmp_path / "gone.png", "a", "a", "b")]
    given = {"hap": gone + same + other + worse + better, "lora": gone}
    page = Page(write_report(fake_experiment(), tmp_path, changed=given))
    assert [image.right for image in (better[0], worse[0], other[0])] == [True, False, False]
    shown = page.text.split("Wrong before, right now")[1].split("What was compared")[0]
    right, wrong = shown.split("Right before, wrong now")
    assert right.count("Class: a Zero-shot: <b> HA-LoRA + DIG + MMD: a") == 8
    assert wrong.count("Class: a Zero-shot: a HA-LoRA + DIG + MMD: c") == 3
    assert "Zero-shot: b" not in shown and "<b><b>" not in page.html
    alts = [attributes["alt"] or "" for tag, attributes in page.tags if tag == "img"]
    assert sum(alt.startswith("Class: a; Zero-shot: ") for alt in alts) == 11


def test_images_of_all_classes_are_shown_before_a_second_of_one(quick: None, tmp_path: Path) -> None:
    files = images(tmp_path / "images", 9, "x", "a")
    last = Changed(files[8].path, "z", "x", "z")
    text = Page(write_report(fake_experiment(), tmp_path, changed={"hap": [*files[:8], last]})).text
    assert "Class: z" in text and text.count("Class: a") == 7


def test_new_sections_stand_in_the_contents_only_with_content(quick: None, tmp_path: Path) -> None:
    names = {"changed", "classes", "calibration"}
    bare = Page(write_report(fake_experiment(), tmp_path / "bare", changed={"hap": []}))
    assert not names & {(a.get("href") or a.get("id") or "").lstrip("#") for _, a in bare.tags}
    changed = {"hap": images(tmp_path / "images", 1, "b", "a")}
    full = Page(write_report(with_answers(fake_experiment()), tmp_path / "full", changed=changed))
    links = [(a["href"] or "")[1:] for tag, a in full.tags if tag == "a"]
    assert names <= set(links)
    assert links == [a["id"] for tag, a in full.tags if tag == "section"]


@pytest.mark.parametrize("gone", [set(some) for n in range(4) for some in itertools.combinations(PARTS, n)])
def test_any_of_the_new_parts_may_be_missing(quick: None, tmp_path: Path, gone: set[str]) -> None:
    experiment = with_answers(fake_experiment(["noisy", "clean"], seeds=2))
    for run in experiment["runs"]:
        for part in gone:
            del run[part]
    html = write_report(experiment, tmp_path).read_text(encoding="utf-8")
    assert ("All 10 classes" in html) == ("by_class" not in gone)
    assert ("The largest confusions" in html) == ("confusions" not in gone)
    assert ('id="calibration"' in html) == ("calibration" not in gone)


def test_classes_are_counted_and_named(quick: None, tmp_path: Path) -> None:
    experiment = counted(zero_shot={"noisy": [1, 7, 5, 5]}, hap={"noisy": [2, 9, 5, 4]})
    experiment["dataset"]["classes"] = ["a", "b", "<i>", "d"]
    page = Page(write_report(experiment, tmp_path))
    assert "hap211" in page.text.replace(" ", "")  # better, the same, worse
    assert "<i>1050.050.0" in page.text.replace(" ", "")
    alt = "zero-shot against hap, 4 of 4 classes, from b (+20.0 points) to d (−10.0)."
    assert any(alt in (a.get("alt") or "") for _, a in page.tags)


def test_methods_scored_on_other_images_are_not_compared_by_class(quick: None, tmp_path: Path) -> None:
    experiment = counted(zero_shot={"noisy": [1, 7]}, hap={"noisy": [2, 9]})
    experiment["runs"][1]["by_class"]["images"] = [10, 12]
    text = Page(write_report(experiment, tmp_path)).text
    assert "Better classes" not in text and "All 2 classes" in text
    gain, scores = Record(experiment).gain("hap"), Record(experiment).ranked.values()
    assert gain is not None and gain.error == pytest.approx(math.hypot(*(score.error or 0.0 for score in scores)))


def painted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, classes: int) -> list[list[answer_figures.Moved]]:
    """The rows of each picture of classes."""
    kept: list[list[answer_figures.Moved]] = []
    monkeypatch.setattr(answer_figures, "classes", lambda rows, **_: kept.append(list(rows)) or b"png")
    write_report(with_answers(fake_experiment(), classes, 5), tmp_path)
    return kept


@pytest.mark.parametrize(("classes", "sizes"), [(50, [50]), (70, [35, 35]), (100, [50, 50]), (130, [50, 50])])
def test_classes_are_painted_from_gain_to_loss(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, classes: int, sizes: list[int]
) -> None:
    pictures = painted(monkeypatch, tmp_path, classes)
    assert [len(rows) for rows in pictures] == sizes
    gains = [row.after - row.before for rows in pictures for row in rows]
    assert gains == sorted(gains, reverse=True)
    experiment = with_answers(fake_experiment(), classes, 5)
    right = {r["method"]: np.array(r["by_class"]["right"]) for r in experiment["runs"]}
    every = 20.0 * (right["hap"] - right["zero-shot"])
    assert (gains[0], gains[-1]) == pytest.approx((every.max(), every.min()))


def test_the_largest_confusions_are_means_over_seeds(quick: None, tmp_path: Path) -> None:
    experiment = counted(hap={"noisy": [[5, 5, 5], [5, 5, 5]]})
    experiment["dataset"]["classes"] = ["a", "b", "c"]
    experiment["runs"][0]["confusions"] = [[0, 1, 5], [2, 0, 1]]
    experiment["runs"][1]["confusions"] = [[2, 0, 10], [0, 1, 4]]
    text = Page(write_report(experiment, tmp_path)).text
    assert "c → a: 5.5 a → b: 4.5" in text and "Means over seeds" in text


def test_calibration_made_by_hand(quick: None, tmp_path: Path) -> None:
    experiment = counted(hap={"noisy": [5, 7]})
    # Six images at 90 %, of which 3 are right; four at 60 %, of which 4 are: gaps (5.4 − 3) + (4 − 2.4) of 10 images.
    experiment["runs"][0]["calibration"] = {
        "images": [0, 0, 0, 0, 0, 4, 0, 0, 6, 0],
        "confidence": [0, 0, 0, 0, 0, 2.4, 0, 0, 5.4, 0],
        "right": [0, 0, 0, 0, 0, 4, 0, 0, 3, 0],
    }
    text = Page(write_report(experiment, tmp_path)).text
    assert "hap78.070.0+8.040.0" in text.split("Expected calibration error")[1].replace(" ", "")


def test_steps_beside_plain_pytorch(quick: None, tmp_path: Path) -> None:
    text = Page(write_report(with_answers(fake_experiment()), tmp_path)).text
    table = text.split("Beside plain PyTorch on the same machine")[1]
    assert "HA-LoRA41.2 ms82.4 ms2.00 ×300 MB400 MB0.75 ×20" in table
    assert "HA-LoRA + DIG + MMD50 ms40 ms0.80 ×310 MB410 MB0.76 ×20" in table
    experiment = fake_experiment() | {"beside_plain": [{"method": "hap", "seconds": None}]}
    assert "HA-LoRA + DIG + MMD–––––––" in Page(write_report(experiment, tmp_path)).text
    assert "Beside plain" not in Page(write_report(fake_experiment(), tmp_path)).text


def test_what_a_domain_shares_with_its_sources_stands_by_it(quick: None, tmp_path: Path) -> None:
    experiment = with_answers(fake_experiment())
    text = Page(write_report(experiment, tmp_path, samples=fake_samples(tmp_path / "images"))).text
    strip = text.split("noisy 300 images, held out")[1].split("rotated")[0]
    assert "The font Sans is also in clean and inverted." in strip
    assert "noisy: The font Sans is also" in Page(write_report(experiment, tmp_path)).text


def test_pictures_of_classes_and_calibration_are_painted(tmp_path: Path) -> None:
    experiment = with_answers(fake_experiment(DOMAINS[:2]), 60)
    experiment["runs"] = [run for run in experiment["runs"] if run["method"] in ("zero-shot", "hap")]
    write_report(experiment, tmp_path)
    for name in ("classes-hap-0", "classes-hap-1", "calibration"):
        with Image.open(tmp_path / "figures" / f"{name}.png") as image:
            assert image.size[0] == figures.WIDTH * figures.DPI
            pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
            hap = tuple(bytes.fromhex(figures.METHOD_COLOURS["hap"][1:]))
            assert (pixels == hap).all(1).sum() > 500
