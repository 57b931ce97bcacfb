"""The sections of an experiment's report, as one class; here those on the data, the protocol and how to repeat it."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from fastheads.train.report import markup
from fastheads.train.report.answers import Answers
from fastheads.train.report.classes import Classes
from fastheads.train.report.comparison import Comparison
from fastheads.train.report.cost import Cost
from fastheads.train.report.opening import Opening
from fastheads.train.report.record import number
from fastheads.train.report.training import Training


class Page(Opening, Answers, Comparison, Classes, Training, Cost):
    """All sections of the page; pictures gather on the way."""

    def data(self, samples: Mapping[str, Sequence[tuple[Path, str]]]) -> str:
        counts = {d: f"{n:,} images" for d, n in self.images.items()}
        classes = self.dataset.get("class_names") or self.dataset.get("classes") or []
        facts = {
            "Data set": self.dataset.get("name"),
            "Folder": self.dataset.get("root"),
            "Classes": f"{len(classes)}: {', '.join(map(str, classes[:20]))}" if classes else None,
            "Files": self.dataset.get("skipped"),
        }
        shared, strips = self.dataset.get("shared_sources") or {}, ""
        for domain, paths in samples.items():
            cells = "".join(markup.sample(path, label, domain, at) for at, (path, label) in enumerate(paths, 1))
            held = ", held out" if [domain] == self.targets else ""
            note = (counts.get(domain, "") + held).removeprefix(", ")
            caption = f"{escape(domain)} <small>{escape(note)}</small>"
            remark = markup.note(escape(str(shared[domain]))) if shared.get(domain) else ""
            strips += f"<figure><figcaption>{caption}</figcaption><div>{cells}</div>{remark}</figure>"
        html = markup.facts(facts if samples else {**facts, **counts}) + self.unreadable()
        others = {domain: words for domain, words in shared.items() if words and domain not in samples}
        html += "".join(markup.note(escape(f"{domain}: {words}")) for domain, words in others.items())
        return html + f'<div class="samples">{strips}</div>'

    def unreadable(self) -> str:
        """The images that were left out, if any were."""
        rows = [(escape(each["file"]), escape(each["reason"])) for each in self.dataset.get("unreadable") or []]
        if not rows:
            return ""
        summary = f"{len(rows):,} images could not be read and were left out"
        return f"<details><summary>{summary}</summary>{markup.table(['File', 'Reason'], rows)}</details>"

    def evaluation(self) -> str:
        part = self.dataset.get("evaluation", "all")
        told = (
            "The accuracy reported is over all of the target's images."
            if part == "all"
            else f"The accuracy reported is over this part of the target's images: {escape(str(part))}."
        )
        watched = any((run.get("history") or {}).get("target") for run in self.runs)
        return told + " Its accuracy during training was recorded for the curves, and nothing follows it." * watched

    def limits(self) -> str:
        limits = [str(limit) for limit in self.experiment.get("limits") or []]
        if not self.over_seeds:
            limits.append("One seed: another seed may order the methods differently.")
        if len(self.targets) == 1:
            limits.append("One held-out domain: the result may differ on another.")
        alone = [m for m in self.ids if any(len(run.get("sources") or ()) == 1 for run in self.of(m))]
        gated = [m for m in alone if number(self.entries.get(m, {}).get("mmd_weight"))]
        if gated:
            limits.append(f"One source domain has no MMD: {self.names(gated)} learned from the cross-entropy alone.")
        limits.append("The settings are those listed above; other settings may order them differently.")
        return "".join(f"<li>{escape(limit)}</li>" for limit in limits)

    def repeat(self) -> str:
        e = self.experiment
        tuning = e.get("tuning") or {}
        shape = [f"{n:,} {what}" for what in ("parameters", "layers", "heads") if (n := self.model.get(what))]
        facts = {
            "Model": ", ".join([str(self.model.get("name") or ""), *shape]).strip(", "),
            "Pretrained": self.model.get("pretrained"),
            "Settings": " ".join(filter(None, [tuning.get("file"), tuning.get("note")])),
            "Date": e.get("date"),
            "Commit": e.get("commit") or "unknown",
            "Device": e.get("device"),
            "Seeds": ", ".join(map(str, self.seeds)),
            **{str(name): version for name, version in (e.get("versions") or {}).items()},
        }
        return f"<pre><code>{escape(str(e.get('command') or ''))}</code></pre>{markup.facts(facts)}"
