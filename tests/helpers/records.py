"""Records of experiments that never ran, for the report, and the page they give."""

from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastheads.train.report import answer_figures, figures

METHODS = {
    "zero-shot": ("Zero-shot CLIP", 0.523),
    "linear-probe": ("Linear probe", 0.561),
    "fine-tune": ("Fine-tuning", 0.497),
    "car-ft": ("CAR-FT", 0.583),
    "lora": ("LoRA", 0.648),
    "ha-lora": ("HA-LoRA", 0.655),
    "dig": ("DIG", 0.571),
    "hap": ("HA-LoRA + DIG + MMD", 0.681),
}
TRAINABLE = [0, 2560, 843_264, 843_264, 3072, 9216, 16, 9232]
DOMAINS = ["clean", "inverted", "noisy", "rotated"]
GATED = {"dig", "hap"}


def fake_run(method: str, target: str, seed: int, steps: int = 300) -> dict[str, Any]:
    """One run whose numbers look like training; zero-shot has none."""
    at = list(METHODS).index(method)
    rng = np.random.default_rng([at, DOMAINS.index(target), seed])
    sources = [domain for domain in DOMAINS if domain != target]
    shift = 0.06 * DOMAINS.index(target) - 0.09
    noise = 0.0 if method == "zero-shot" else float(rng.normal(0, 0.012))
    accuracy = {domain: 0.72 + 0.02 * at + float(rng.normal(0, 0.01)) for domain in sources}
    accuracy[target] = METHODS[method][1] + shift + noise
    run: dict[str, Any] = {
        "method": method, "target": target, "seed": seed, "sources": sources,
        "accuracy": accuracy, "selected_step": None, "steps": None, "seconds": None,
        "images_per_second": None, "peak_memory_mb": 310.0, "trainable_parameters": TRAINABLE[at],
        "saved_bytes": None, "merge_max_difference": None, "history": None, "gates": None,
    }  # fmt: skip
    if method == "zero-shot":
        return run
    x = np.arange(1, steps + 1)
    falling = 0.35 + 0.04 * (7 - at) + 1.6 * np.exp(-x / (40 + 8 * at))
    cross_entropy = falling + rng.normal(0, 0.06, steps)
    mmd = 0.02 + 0.12 * np.exp(-x / 90) + np.abs(rng.normal(0, 0.008, steps))
    kl = 0.05 * (1 - np.exp(-x / 60)) + np.abs(rng.normal(0, 0.004, steps))
    run |= {
        "selected_step": 250, "steps": steps, "seconds": 9.0 + 3 * at + float(rng.uniform(0, 2)),
        "images_per_second": 1900.0 - 120 * at, "saved_bytes": TRAINABLE[at] * 4 + 900,
        "merge_max_difference": 2.4e-7 * (1 + at) if at >= 4 else None,
        "history": {
            "step": x.tolist(),
            "loss": (cross_entropy + (mmd if method in GATED else 0)).tolist(),
            "cross_entropy": cross_entropy.tolist(),
            "mmd": mmd.tolist() if method in GATED or method == "ha-lora" else None,
            "context_kl": kl.tolist() if method == "car-ft" else None,
            "validation": [
                [int(s), float(0.4 + (0.3 + 0.02 * at) * (1 - np.exp(-s / 60)))]
                for s in range(25, steps + 1, 25)
            ],
            "target": [[s, accuracy[target] * (1 - np.exp(-s / 60))] for s in range(25, steps + 1, 25)],
            "context_accuracy": [[s, 0.9 - 1e-4 * at * s] for s in range(0, steps + 1, 25)],
            "context_change": [[s, 1e-4 * at * s] for s in range(0, steps + 1, 25)],
        },
        "wise_ft": [
            {"alpha": alpha, "accuracy": {d: (0.6 + alpha * a) / (1 + alpha) for d, a in accuracy.items()}}
            for alpha in (0.0, 0.5, 1.0)
        ],
    }  # fmt: skip
    if method in GATED:
        theta = rng.normal(0, 0.8, (4, 4))
        recorded = list(range(0, steps + 1, 50))
        values = []
        for step in recorded:
            weights = np.exp(theta * (1 - np.exp(-step / 120)))
            values.append((4 * weights / weights.sum(1, keepdims=True)).tolist())
        run["gates"] = {"step": recorded, "values": values}
    return run


def fake_experiment(targets: list[str] | None = None, seeds: int = 1) -> dict[str, Any]:
    """`make demo`'s record: one target and one seed; or more of both."""
    methods = [
        {
            "id": name,
            "label": label,
            "description": f"{label}: a low-rank delta on query and value for each head on its own.",
            "lr": None if name == "zero-shot" else 2e-4,
            "mmd_weight": 1.0 if name in GATED else None,
            "context_weight": 1.0 if name == "car-ft" else None,
        }
        for name, (label, _) in METHODS.items()
    ]
    return {
        "title": "Heads that travel: CLIP on unseen digits",
        "command": "python -m fastheads.demo --target noisy --seeds 1 --out runs/demo",
        "date": "2026-07-14T09:30:00+00:00", "commit": "a1b2c3d", "device": "cpu",
        "wall_seconds": 184.0, "peak_memory_mb": 612.0,
        "versions": {"python": "3.12.3", "torch": "2.11.0", "open_clip_torch": "3.3.0",
                     "fastheads": "0.1.0"},
        "dataset": {
            "name": "digits in four styles", "root": "data/digits", "domains": DOMAINS,
            "classes": [str(digit) for digit in range(10)],
            "images": dict.fromkeys(DOMAINS, 1797), "evaluation": "all",
        },
        "model": {"name": "fastheads-demo", "pretrained": "demo-digits", "parameters": 1_203_457,
                  "layers": 4, "heads": 4, "bytes": 4_821_004},
        "methods": methods,
        "runs": [
            fake_run(method, target, seed)
            for method in METHODS for target in targets or ["noisy"] for seed in range(seeds)
        ],
        "tuning": {"file": "configs/demo.json", "note": "chosen once, on source validation."},
        "limits": ["A tiny model on 8×8 digits: it shows that the method works, not how well."],
    }  # fmt: skip


def fake_samples(root: Path, size: int = 8) -> dict[str, list[tuple[Path, str]]]:
    """Six images per domain, `size` pixels wide, each with its class."""
    rng, samples = np.random.default_rng(0), {}
    for domain in DOMAINS:
        samples[domain] = [(root / domain / str(digit) / "0.png", str(digit)) for digit in range(6)]
        for path, _ in samples[domain]:
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (size, size), dtype=np.uint8)).save(path)
    return samples


def unpainted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has reports written without painting."""
    for name in ("bars", "curves", "over", "gate_map", "gate_history", "source_and_target"):
        monkeypatch.setattr(figures, name, lambda *args, **kwargs: b"png")
    for name in ("classes", "reliability", "in_and_out"):
        monkeypatch.setattr(answer_figures, name, lambda *args, **kwargs: b"png")


class Page(HTMLParser):
    """What a page loads, its tags, and its text with white space made even."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.html = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(self.html)
        self.text = " ".join("".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def with_answers(experiment: dict[str, Any], classes: int = 10, each: int = 30) -> dict[str, Any]:
    """`experiment` with what a record may also hold: counts by class, confusions, calibration, steps beside plain."""
    rng = np.random.default_rng(classes)
    names = [f"letter {at}" for at in range(classes)]
    experiment["dataset"] |= {
        "classes": names,
        "images": dict.fromkeys(DOMAINS, classes * each),
        "errors": "class",
        "shared_sources": {"noisy": "The font Sans is also in clean and inverted."},
    }
    hard = rng.normal(0, 0.15, classes)
    for run in experiment["runs"]:
        target = run["target"]
        right = rng.binomial(each, np.clip(run["accuracy"][target] + hard, 0.02, 0.98))
        run["accuracy"][target] = float(right.sum() / (classes * each))
        run["by_class"] = {"images": [each] * classes, "right": right.tolist()}
        pairs = [(int(t), int(a)) for t, a in rng.integers(0, classes, (12, 2)) if t != a]
        counts = sorted(rng.integers(1, each, len(set(pairs))).tolist(), reverse=True)
        run["confusions"] = [[t, a, n] for (t, a), n in zip(sorted(set(pairs)), counts, strict=True)]
        images = rng.multinomial(classes * each, np.linspace(0.02, 0.18, 10))
        confidence = images * (np.arange(10) + 0.5) / 10
        run["calibration"] = {
            "images": images.tolist(),
            "confidence": confidence.tolist(),
            "right": rng.binomial(images, np.clip((np.arange(10) - 0.5) / 10, 0, 1)).tolist(),
        }
    experiment["beside_plain"] = [
        {"method": "ha-lora", "seconds": 0.0412, "plain_seconds": 0.0824, "memory_mb": 300.0,
         "plain_memory_mb": 400.0, "steps": 20},
        {"method": "hap", "seconds": 0.05, "plain_seconds": 0.04, "memory_mb": 310.0, "plain_memory_mb": 410.0,
         "steps": 20},
    ]  # fmt: skip
    return experiment
