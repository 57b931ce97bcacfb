"""`bench.mmd`: what it writes can be measured in pieces, says what was met, and shows what the result file holds."""

import json
from pathlib import Path

import pytest

from bench import mmd
from bench.base.results import Row, fields
from bench.base.timing import compare
from bench.report import mmd_page
from bench.report.mmd_page import OURS

ROOT = Path(__file__).resolve().parents[2]
RESULTS, DOC = ROOT / "bench" / "results" / "mmd-cpu.json", ROOT / "docs" / "results" / "mmd-cpu.md"


@pytest.fixture
def tiny(monkeypatch):
    """Each part and the growth on a few samples, memory in this process."""
    peers = ("DomainBed", "reference")
    parts = {"12 × 36 × 768": ((12, 16, 3, 2), (OURS, "ours: adaptive", "ours: dan", *peers), 2, 1e-3)}
    parts["3 × 2048 × 768"] = ((24, 16, 3, 1), (OURS, *peers), 2, 0.0)
    parts[mmd.LARGE] = ((24, 16, 2, 1), (OURS, *peers), 1, 0.0)
    monkeypatch.setattr(mmd, "PARTS", parts)
    monkeypatch.setattr(mmd, "GROWTH_N", (8, 16))
    monkeypatch.setattr(mmd, "GROWTH_D", (4, 768))
    monkeypatch.setattr(mmd_page, "GROWTH_SAMPLES", 16)
    monkeypatch.setattr(mmd, "PRODUCT", 16)
    monkeypatch.setattr(mmd, "compare", lambda runs, device, **_: compare(runs, device, rounds=2, sample_seconds=1e-4))
    monkeypatch.setattr(mmd, "in_process", lambda name, part, threads: mmd.measure_alone(name, part))


def test_parts_are_measured_one_after_the_other_into_one_file(tiny, tmp_path, capsys):
    file, doc, plot = tmp_path / "mmd.json", tmp_path / "mmd.md", tmp_path / "growth.png"
    written = ["--json", str(file), "--doc", str(doc), "--plot", str(plot), "--threads", "1"]
    mmd.main([*written, "--parts", "12 × 36 × 768", "growth"])
    first = json.loads(file.read_text(encoding="utf-8"))
    assert set(first) == {"12 × 36 × 768", "growth"} and plot.read_bytes().startswith(b"\x89PNG")
    mmd.main([*written, "--parts", "3 × 2048 × 768", mmd.LARGE])
    both = json.loads(file.read_text(encoding="utf-8"))
    assert {part: both[part] for part in first} == first and set(both) == {*mmd.PARTS, "growth"}
    text = doc.read_text(encoding="utf-8")
    for heading in (*mmd.PARTS, "Growth with N and D"):
        assert f"## {heading}\n" in text
    assert "goes into: sort and centre" in text and f"]({plot.name})" in text
    assert "ours: domainbed, in a process of its own" in capsys.readouterr().out


def part(share, **rows):
    """A part's content: seconds and extra bytes of each candidate."""
    own = [Row(mmd.GROUP, "here", n, seconds={"median": s}, peak_bytes=int(b)) for n, (s, b) in rows.items()]
    return {"rows": list(map(fields, own)), "share_of_matmul": share}


def test_targets_are_met_or_not_as_the_numbers_say():
    content = {
        "12 × 36 × 768": part(0.1, **{OURS: (1.0, 1), "DomainBed": (9.9, 0)}),
        "3 × 2048 × 768": part(0.7, **{OURS: (1.0, 5), "DomainBed": (3.0, 100)}),
        "3 × 256 × 768": part(0.8, **{OURS: (1.0, 5), "DomainBed": (3.0, 0), "KeOps": (51.0, 0)}),
        "16384 × 768": part(0.8, **{OURS: (1.0, 301e6)}),
    }
    found = {(row[0], row[1].split(" than ")[-1]): row[3] for row in mmd_page.verdicts(content, list(content))}
    assert found["12 × 36 × 768", "DomainBed"] == "no"
    assert found["3 × 2048 × 768", "DomainBed"] == "yes"
    assert found["3 × 2048 × 768", "≤ 5% of its extra memory"] == "yes"
    assert found["3 × 256 × 768", "KeOps"] == "yes"
    assert found["16384 × 768", "≤ 300 MB extra"] == "no"
    assert [met for (_, target), met in found.items() if target.startswith("aim")] == ["no", "yes", "yes", "yes"]


@pytest.mark.skipif(not RESULTS.exists(), reason="not measured yet: python -m bench.mmd")
def test_the_document_shows_the_result_file():
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert set(results) == {*mmd.PARTS, "growth"}
    plot = DOC.parent / "mmd-growth.png"
    assert DOC.read_text(encoding="utf-8") == mmd_page.document(results, list(mmd.PARTS), plot) and plot.exists()
