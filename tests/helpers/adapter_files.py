"""The files of an adapter, read and rewritten behind fastheads' back. Not a test file."""

import json

from safetensors.torch import load_file, save_file

import fastheads

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def values(model):
    return {k: v.clone() for k, v in fastheads.adapter_state_dict(model).items()}


def rewrite(folder, *, tensors=lambda t: t, about=lambda a: a):
    """The tensor file again, with its tensors or its description changed."""
    from safetensors import safe_open

    with safe_open(folder / TENSORS, framework="pt") as f:
        metadata = json.loads(f.metadata()["fastheads"])
    save_file(tensors(load_file(folder / TENSORS)), folder / TENSORS, {"fastheads": json.dumps(about(metadata))})
