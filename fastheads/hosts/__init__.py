"""The attention modules fastheads can patch: one file each, and where OpenCLIP keeps them (`towers`)."""

from __future__ import annotations

from torch import nn

from fastheads.hosts.huggingface import HuggingFaceAttentionHost
from fastheads.hosts.mha import MultiheadAttentionHost
from fastheads.hosts.openclip import OpenClipAttentionHost
from fastheads.hosts.timm import TimmAttentionHost
from fastheads.hosts.towers import Tower, find_tower

HOSTS = (MultiheadAttentionHost, OpenClipAttentionHost, TimmAttentionHost, HuggingFaceAttentionHost)
Host = (
    type[MultiheadAttentionHost]
    | type[OpenClipAttentionHost]
    | type[TimmAttentionHost]
    | type[HuggingFaceAttentionHost]
)

__all__ = ["HOSTS", "Host", "Tower", "find_tower", "host_of"]


def host_of(module: nn.Module) -> Host | None:
    """The host that knows this kind of attention module, or None."""
    return next((host for host in HOSTS if host.matches(module)), None)
