"""What the tests of the report share."""

import pytest
from records import unpainted


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No painting, for tests of words only."""
    unpainted(monkeypatch)
