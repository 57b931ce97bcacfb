"""What the tests of the report share."""

import pytest

from fastheads.train.report import answer_figures, figures


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No painting, for tests of words only."""
    for name in ("bars", "curves", "gate_map", "gate_history", "source_and_target"):
        monkeypatch.setattr(figures, name, lambda *args, **kwargs: b"png")
    for name in ("classes", "reliability"):
        monkeypatch.setattr(answer_figures, name, lambda *args, **kwargs: b"png")
