"""The attention modules fastheads can patch: one file each, and where OpenCLIP keeps them (`towers`)."""

from __future__ import annotations

from torch import nn

from fastheads.hosts.huggingface import BertSelfAttentionHost, HuggingFaceAttentionHost, T5SelfAttentionHost
from fastheads.hosts.mha import MultiheadAttentionHost
from fastheads.hosts.openclip import OpenClipAttentionHost
from fastheads.hosts.timm import FastVitAttentionHost, TimmAttentionHost, TimmRelativeAttentionHost
from fastheads.hosts.towers import NAMES, Tower, find_tower
from fastheads.nn import HeadAttention

HOSTS = (
    MultiheadAttentionHost,
    OpenClipAttentionHost,
    TimmAttentionHost,
    TimmRelativeAttentionHost,
    FastVitAttentionHost,
    HuggingFaceAttentionHost,
    BertSelfAttentionHost,
    T5SelfAttentionHost,
)
Host = (
    type[MultiheadAttentionHost]
    | type[OpenClipAttentionHost]
    | type[TimmAttentionHost]
    | type[TimmRelativeAttentionHost]
    | type[FastVitAttentionHost]
    | type[HuggingFaceAttentionHost]
    | type[BertSelfAttentionHost]
    | type[T5SelfAttentionHost]
)

__all__ = ["HOSTS", "NAMES", "Host", "Tower", "find_tower", "host_of"]


def host_of(module: nn.Module) -> Host | None:
    """The host that knows this kind of attention module, patched or not, or None."""
    mine = [type(module).__bases__[0]] if isinstance(module, HeadAttention) else []
    return next((host for host in HOSTS if host in mine or host.matches(module)), None)
