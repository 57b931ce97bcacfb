"""Three small domains on disk."""

import pytest
from pictures import write_set

from fastheads.train.data.domains import read_domains


@pytest.fixture
def root(tmp_path):
    return write_set(tmp_path / "set")


@pytest.fixture
def folders(root):
    return read_domains(root)
