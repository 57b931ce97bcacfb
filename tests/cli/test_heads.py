"""fastheads heads: the record and the page that it writes."""

import json

from commands import base, data, done
from commands import run as command
from records import Page


def test_the_record_and_the_page_say_the_same(world, tmp_path):
    out = tmp_path / "heads"
    options = ("--target", "sepia", "--most", "1", "--images", "2", "--out", out)
    printed = done("heads", *base(world.root), *data(world.root), *options)
    (run,) = json.loads((out / "heads.json").read_text())["runs"]
    page = Page(out / "heads.html")
    assert str(out / "heads.html") in printed
    assert len(run["heads"]) == 6 * 4 and run["test_images"] == 10 and run["sources"] == ["day", "night"]
    assert all(set(head["closed"]) == {"day", "night", "sepia"} for head in run["heads"])
    for row in run["selections"]:
        assert row["name"] in page.text and row["chosen"] in page.text
        assert f"{100 * row['target']:.1f}" in page.text
        assert row["name"] == "none" or f"{row['name']:<16}" in printed


def test_it_goes_on_with_what_is_missing_and_refuses_what_other_options_found(world, tmp_path):
    out = tmp_path / "heads"
    fixed = ("heads", *base(world.root), *data(world.root), "--target", "sepia", "--most", "1", "--images", "2")
    done(*fixed, "--out", out)
    first = json.loads((out / "heads.json").read_text())
    again = done(*fixed, "--seed", "0", "1", "--out", out)
    both = json.loads((out / "heads.json").read_text())
    assert both["runs"][0] == first["runs"][0] and [run["seed"] for run in both["runs"]] == [0, 1]
    assert "sepia, seed 1" in again and "sepia, seed 0" not in again
    code, _, said = command(*fixed, "--test-images", "3", "--out", out)
    assert code == 2 and "other options" in said


def test_what_was_left_without_a_record_is_measured_anew(world, tmp_path):
    """Nothing says whose features those are."""
    out = tmp_path / "heads"
    (out / "features").mkdir(parents=True)
    fixed = ("heads", *base(world.root), *data(world.root), "--target", "sepia", "--most", "1", "--images", "2")
    done(*fixed, "--out", out)
    kept = {path.name: path.read_bytes() for path in (out / "features").glob("*.pt")}
    assert kept
    (out / "heads.json").unlink()
    for name in kept:
        (out / "features" / name).write_bytes(b"of another model")
    done(*fixed, "--out", out)
    assert set(kept) == {path.name for path in (out / "features").glob("*.pt")}
