"""One HTML file that tells what a leave-one-domain-out experiment found.

`write_report` turns the experiment's record (plain JSON values) into `report.html`, with its style and pictures inside,
and `figures/*.png`. `record.py` and `clusters.py` work out the numbers, `figures.py` and `answer_figures.py` paint the
pictures. The page's sections stand by their thought in `opening.py`, `answers.py`, `classes.py`, `training.py`,
`robustness.py`, `cost.py` and `sections.py`, which joins them. `report.html` has the fixed words, `style.css` the
style.
"""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from fastheads.files import write_whole
from fastheads.train.data.presets import preset_of
from fastheads.train.report import markup
from fastheads.train.report.record import Changed
from fastheads.train.report.sections import Page

# The page's contents, in its order; a section that the record has nothing for is left out.
CONTENTS = {
    "data": "Data",
    "accuracy": "Accuracy",
    "differences": "Differences",
    "curves": "Settings",
    "published": "Published",
    "changed": "What changed",
    "classes": "Classes",
    "calibration": "Calibration",
    "methods": "Methods",
    "gates": "Gates",
    "training": "Training",
    "selection": "Source and target",
    "size": "Size",
    "merge": "Merge",
    "time": "Time",
    "protocol": "Protocol and limits",
    "repeat": "Repeat it",
}
CHANGED = """Pictures of the domain nobody trained on that a method answers otherwise than zero-shot CLIP: up to eight
that it turned right, and up to eight that it turned wrong. Nobody picked them; the first of each class come first."""
CLASSES = """An average hides which classes gained and which lost. With few images a class, much of a single class's
change is chance."""
CALIBRATION = """Of the images that a method is 80 % sure of, it should get 80 % right. In each panel the images are
sorted into ten bins by confidence, the largest probability; a larger point holds more of them. On the dotted line a
method is as sure as it should be, below it too sure. The expected calibration error (ECE) is the mean distance from the
line, each bin counted by its images."""


def write_report(
    experiment: dict[str, Any],
    out: str | Path,
    *,
    samples: Mapping[str, Sequence[tuple[Path, str]]] | None = None,
    changed: Mapping[str, Sequence[Changed]] | None = None,
) -> Path:
    """Writes `out/report.html`, one self-contained file, and `out/figures/*.png`.

    Args:
        experiment: the record of an experiment: its runs, methods, data set, model and versions.
        out: the folder to write to, created where it is missing. Each file is replaced whole, the
            page last, so that a kill leaves the old report.
        samples: a few images per domain to show, each with its class (`DomainFolders.samples`); those that can't be
            read are left out.

    Returns:
        The path of the page.

    Raises:
        ValueError: if `experiment` has no runs.
    """
    if not experiment.get("runs"):
        raise ValueError("experiment: 'runs' is empty, there is nothing to report")
    out, page = Path(out).expanduser(), Page(experiment)
    template = Template(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))
    title = str(experiment.get("title") or "Experiment")
    known = preset_of(str(page.dataset.get("name") or ""))
    optional = {
        "differences": markup.section("differences", "Method against method", "", page.differences()),
        "curves": markup.section("curves", "What a setting changes", "", page.curves()),
        "published": markup.section("published", "Published numbers", "", page.published(known) if known else ""),
        "changed": markup.section("changed", "What changed", CHANGED, page.changed(changed or {})),
        "classes": markup.section("classes", "Class by class", CLASSES, page.classes()),
        "calibration": markup.section("calibration", "Is it as sure as it should be?", CALIBRATION, page.calibration()),
    }
    content = template.substitute(
        title=escape(title),
        headline=page.headline(),
        meta=page.meta(),
        tiles=page.tiles(),
        data=page.data(samples or {}),
        accuracy=page.accuracy(),
        methods=page.methods(),
        gates=page.gates(),
        training=page.training(),
        selection=page.selection(),
        robustness=page.robustness(),
        size=page.size(),
        merge=page.merge(),
        time=page.time(),
        evaluation=page.evaluation(),
        limits=page.limits(),
        repeat=page.repeat(),
        contents=markup.contents({name: words for name, words in CONTENTS.items() if optional.get(name, True)}),
        **optional,
    )
    for name, png in page.pictures.items():
        write_whole(Path(out, "figures", f"{name}.png"), png)
    return write_whole(Path(out, "report.html"), markup.document(title, content))
