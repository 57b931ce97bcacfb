"""The MMD with csrc/ and without, in one panel and in several; torch's threads as a test wants them."""

import pytest
import torch
from mmd_cases import PANELS

from fastheads.ops import mmd_panels, native


@pytest.fixture(params=["native", "torch"])
def backend(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(native, "library", lambda: None)
    elif native.library() is None:
        pytest.skip("csrc/ was not built (no C++ compiler at install)")
    return request.param


@pytest.fixture(params=PANELS, ids=["one_panel", "panels"])
def panels(request, monkeypatch):
    monkeypatch.setattr(mmd_panels, "WORKSPACE", request.param)
    return request.param


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
