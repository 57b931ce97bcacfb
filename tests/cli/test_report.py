"""fastheads report: the runs of train on one page, and as CSV and LaTeX."""

from commands import done, run
from records import Page, unpainted


def test_runs_of_train_are_compared(world, tmp_path, monkeypatch):
    unpainted(monkeypatch)
    out = tmp_path / "out"
    printed = done("report", world.root / "run", "--csv", "--latex", "--out", out)
    assert printed.splitlines()[-3:] == [str(out / name) for name in ("report.html", "report.csv", "report.tex")]
    page = Page(out / "report.html")
    assert "Method against method" in page.text and "1 seeds, 12 images" in page.html
    assert "hap,zero-shot,sepia" in (out / "report.csv").read_text().replace("zero-shot,hap", "hap,zero-shot")


def test_a_folder_without_runs_is_one_line(world):
    code, out, err = run("report", world.root / "shapes")
    assert (code, out) == (2, "") and len(err.splitlines()) == 1 and "no run in it" in err
    code, out, err = run("report", world.root / "gone")
    assert (code, out) == (2, "") and len(err.splitlines()) == 1
