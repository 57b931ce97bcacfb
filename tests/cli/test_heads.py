"""fastheads heads: the record and the page that it writes."""

import json

from commands import base, data, done
from records import Page


def test_the_record_and_the_page_say_the_same(world, tmp_path):
    out = tmp_path / "heads"
    options = ("--target", "sepia", "--most", "1", "--images", "2", "--out", out)
    printed = done("heads", *base(world.root), *data(world.root), *options)
    (run,) = json.loads((out / "heads.json").read_text())["runs"]
    page = Page(out / "heads.html")
    assert str(out / "heads.html") in printed
    assert len(run["heads"]) == 6 * 4 and run["test_images"] == 6 and run["sources"] == ["day", "night"]
    assert all(set(head["closed"]) == {"day", "night", "sepia"} for head in run["heads"])
    for row in run["selections"]:
        assert row["name"] in page.text and row["chosen"] in page.text
        assert f"{100 * row['target']:.1f}" in page.text
        assert row["name"] == "none" or f"{row['name']:<14}" in printed
