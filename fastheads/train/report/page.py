"""One HTML file that tells what a leave-one-domain-out experiment found.

`write_report` turns the experiment's record (plain JSON values) into `report.html`, with its style and pictures inside,
and `figures/*.png`. `record.py` works out the numbers, `figures.py` paints the pictures, `sections.py` and `markup.py`
write the page's sections; its fixed words and its style are in `report.html` beside this file.
"""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from fastheads.files import write_whole
from fastheads.train.report.sections import Page


def write_report(
    experiment: dict[str, Any],
    out: str | Path,
    *,
    samples: Mapping[str, Sequence[tuple[Path, str]]] | None = None,
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
    html = template.substitute(
        title=escape(str(experiment.get("title") or "Experiment")),
        headline=page.headline(),
        meta=page.meta(),
        tiles=page.tiles(),
        data=page.data(samples or {}),
        accuracy=page.accuracy(),
        methods=page.methods(),
        gates=page.gates(),
        training=page.training(),
        selection=page.selection(),
        size=page.size(),
        merge=page.merge(),
        time=page.time(),
        evaluation=page.evaluation(),
        limits=page.limits(),
        repeat=page.repeat(),
    )
    for name, png in page.pictures.items():
        write_whole(Path(out, "figures", f"{name}.png"), png)
    return write_whole(Path(out, "report.html"), html.encode())
