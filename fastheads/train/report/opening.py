"""How the report opens: the answers a reader asks for, and the tiles."""

from html import escape

from fastheads.train.report import figures, markup
from fastheads.train.report.record import ADAPTERS, Score, number
from fastheads.train.report.shown import Shown


def _verdict(difference: Score) -> str:
    """The answer in a word or two; a gain that chance could explain is not a yes."""
    if difference.mean <= 0:
        return "No."
    return "Yes." if difference.clear else "It seems so." if difference.error is None else "Not shown."


def _lies(difference: Score) -> str:
    size = Score(abs(difference.mean), difference.error)
    return f"{size} points {'above' if difference.mean >= 0 else 'below'}"


def _sure(difference: Score) -> str:
    """The end of a sentence with a difference: whether chance could explain it."""
    if difference.error is None:
        return "; how sure that is, is not known."
    if difference.clear:
        return ". That is more than two standard errors."
    return ". That is within two standard errors, so it may be chance."


class Opening(Shown):
    """The page's header."""

    def headline(self) -> str:
        names = ", ".join(self.targets)
        held = f"{names} was held out: no method was trained on it."
        if len(self.targets) > 1:
            held = f"Each of {len(self.targets)} domains was held out in turn ({names})."
        if not self.ranked:
            return f'<p class="lead">{escape(held)} No method has a run on all of them.</p>'
        (best, top), base = next(iter(self.ranked.items())), self.ranked.get("zero-shot")
        others = [m for m in self.ranked if m not in (best, "zero-shot")]
        first, rest = self.label(best), ""
        lead = f"{first} came first with {top} %."
        if base and best != "zero-shot":
            gain = f"{top.mean - base.mean:.1f} points above it."
            lead = f"Zero-shot CLIP got {base} %. {first} did best with {top} %, {gain}"
        elif base and others:
            closest = f"{self.label(others[0])} came closest with {self.ranked[others[0]]} %."
            lead = f"Zero-shot CLIP got {base} %, and no trained method did better; {closest}"
        lags = {m: self.difference(best, m) for m in self.ranked if m != best}
        close = [m for m, lag in lags.items() if lag and lag.mean < 2 * (lag.error or 0.0)]
        if close:
            rest += f"Within two standard errors of the first, so too close to call: {self.names(close)}. "
        below = [m for m in others if base and self.ranked[m].mean < base.mean]
        if below:
            rest += f"Below zero-shot: {self.names(below)}. "
        order = ", ".join(f"{self.label(m)} {score.mean:.1f}" for m, score in self.ranked.items())
        rest += f"In order, in per cent: {order}."
        lead = escape(f"{held} {lead}").replace(" ± ", "&nbsp;±&nbsp;").replace(" %", "&nbsp;%")
        return f'<p class="lead">{lead}</p>{self.answers()}<p>{escape(rest)}</p>'

    def answers(self) -> str:
        """What a reader asks first, answered in short sentences; what the record can't answer is left out."""
        asked = {
            "Better on pictures nobody trained on?": self.helps(),
            "Do the gates and the MMD add anything?": self.beats_its_parts(),
            "At what cost?": self.costs(),
        }
        rows = "".join(f"<dt>{question}</dt> <dd>{escape(text)}</dd> " for question, text in asked.items() if text)
        return f'<dl class="answers">{rows}</dl>' if rows else ""

    def helps(self) -> str:
        """The best adapter, and HAP, against zero-shot."""
        gains = {method: gain for method in self.leading() if (gain := self.gain(method))}
        if not gains:
            return ""
        (best, gain), *others = gains.items()
        kind = "adapter" if best in ADAPTERS else "trained method"
        text = f"{_verdict(gain)} The best {kind}, {self.brief(best)}, is {_lies(gain)} zero-shot CLIP{_sure(gain)}"
        rivals = [m for m in self.ranked if m in ADAPTERS]
        if best != "hap" and len(rivals) > 1 and gain.mean > 0:
            text += f" It is the best of {len(rivals)} by these very scores, so part of its lead is luck."
        for method, other in others:
            text += f" {self.brief(method)} is {_lies(other)} zero-shot CLIP{_sure(other)}"
        return text

    def beats_its_parts(self) -> str:
        """HAP against HA-LoRA, which is HAP without gates and MMD."""
        found = self.difference("hap", "ha-lora")
        if found is None:
            return ""
        text = f"{_verdict(found)} {self.brief('hap')} is {_lies(found)} {self.brief('ha-lora')}, which has neither"
        text += _sure(found)
        return text + " Here they cost accuracy." if found.clear and found.mean < 0 else text

    def costs(self) -> str:
        """Of the adapter that stands for all: what is trained, how long it takes, what inference costs."""
        method, whole = self.adapter(), number(self.model.get("parameters"))
        if method is None:
            return ""
        name, text = self.brief(method), ""
        if trained := self.mean_of(method, "trainable_parameters"):
            share = f", {figures.percent(trained, whole)} of the model's {whole:,.0f}" if whole else ""
            text += f"{name} trains {trained:,.0f} numbers{share}. "
        if seconds := self.mean_of(method, "seconds"):
            text += f"A run takes {figures.duration(seconds)} on {self.experiment.get('device', 'an unnamed device')}. "
        beside = [each for each in self.experiment.get("beside_plain") or [] if each["method"] == method]
        for each in beside:
            mine, plain = (number(each.get(key)) for key in ("seconds", "plain_seconds"))
            if mine and plain:
                text += f"A training step takes {markup.step(mine)}, and in plain PyTorch {markup.step(plain)}. "
        if self.mean_of(method, "merge_max_difference") is not None:
            text += "Merged into the weights, it costs nothing extra at inference: the merged model is a stock one."
        return text.strip()

    def count(self) -> str:
        return "1 run" if len(self.runs) == 1 else f"{len(self.runs)} runs"

    def meta(self) -> str:
        e, seeds = self.experiment, len(self.seeds)
        parts = [
            self.count(),
            "one seed" if seeds == 1 else f"{seeds} seeds",
            str(e.get("date") or "")[:16].replace("T", " "),
            str(e.get("device") or ""),
        ]
        return escape(" · ".join(filter(None, parts))) + f"<br>{escape(self.error_kind())}"

    def tiles(self) -> str:
        whole = f"{len(self.targets)} domains" if len(self.targets) > 1 else self.targets[0]
        shown = [("Held out", whole, "in turn" if len(self.targets) > 1 else "never trained on")]
        best = next((m for m in self.ranked if m != "zero-shot"), "zero-shot")
        for method in dict.fromkeys(m for m in ("zero-shot", best, "hap") if m in self.ranked):
            place = f"place {self.place(method)} of {len(self.ranked)} on the target"
            shown.append((self.label(method), f"{self.ranked[method].mean:.1f} %", place))
        adapter, full = self.adapter(), number(self.model.get("bytes"))
        saved = self.mean_of(adapter, "saved_bytes") if adapter else None
        if adapter and saved and full:
            note = f"on disk, {figures.percent(saved, full)} of the model's {figures.size(full)}"
            shown.append((f"{self.brief(adapter)} adapter", figures.size(saved), note))
        wall = number(self.experiment.get("wall_seconds"))
        if wall is not None:
            shown.append(("Whole experiment", figures.duration(wall), self.count()))
        return "".join(
            f'<div class="tile"><span>{escape(a)}</span><b>{escape(b)}</b><span>{escape(c)}</span></div>'
            for a, b, c in shown
        )
