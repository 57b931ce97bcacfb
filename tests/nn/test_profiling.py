"""Layers by name where a profiler looks."""

from contextlib import nullcontext

import torch
from standins import features, patched
from torch.profiler import ProfilerActivity, profile


def test_a_profiler_sees_each_layer_by_its_name():
    model = patched()
    features(model)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        features(model)
    named = {event.key: event.count for event in seen.key_averages() if event.key.startswith("fastheads::visual")}
    assert named == {f"fastheads::visual.{layer}": 1 for layer in range(3)}


def test_nothing_is_recorded_where_none_looks(monkeypatch):
    monkeypatch.setattr(torch.autograd.profiler, "record_function", None)
    features(patched())


def test_nsight_sees_them_where_ranges_are_emitted(monkeypatch):
    named = []
    monkeypatch.setattr(torch.autograd.profiler, "record_function", lambda name: named.append(name) or nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)  # for a GPU, at both ends
    with torch.autograd.profiler.emit_nvtx():
        features(patched())
    assert {f"fastheads::visual.{layer}" for layer in range(3)} <= set(named)
