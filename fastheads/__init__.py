"""fastheads: adapting CLIP's attention heads to unseen domains.

report = fastheads.patch(model)                                  # in place: per-head LoRA and gates
with fastheads.capture_heads(model) as heads:
    features = model.encode_image(images)
loss = cross_entropy(features) + lam * fastheads.head_mmd(heads, domains)
fastheads.merge(model)                                           # a stock OpenCLIP model again
"""

from fastheads.adapters import load_adapter, save_adapter
from fastheads.capture import capture_heads
from fastheads.config import HeadConfig
from fastheads.folding import merge, wise_ft
from fastheads.losses import class_text_weights, context_kl, context_text_weights, head_mmd, mmd
from fastheads.model import (
    adapter_state_dict,
    base_state_dict,
    gate_parameters,
    gates,
    is_patched,
    lora_parameters,
)
from fastheads.patching import PatchReport, disabled, explain, masked, patch, unpatch
from fastheads.train.planning import Plan, plan

__version__ = "0.1.0"

__all__ = [
    "HeadConfig",
    "PatchReport",
    "Plan",
    "adapter_state_dict",
    "base_state_dict",
    "capture_heads",
    "class_text_weights",
    "context_kl",
    "context_text_weights",
    "disabled",
    "explain",
    "gate_parameters",
    "gates",
    "head_mmd",
    "is_patched",
    "load_adapter",
    "lora_parameters",
    "masked",
    "merge",
    "mmd",
    "patch",
    "plan",
    "save_adapter",
    "unpatch",
    "wise_ft",
]
