"""Every call looks into the same wrappers, in any order, and none looks past PEFT."""

import contextlib
import copy

import pytest
import torch
import torch.distributed as dist
from standins import ALL, clip, images, patched, texts
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import fastheads
from fastheads import HeadConfig
from fastheads.adapters import read_adapter
from fastheads.hosts.wrappers import unwrap

CONFIG = HeadConfig(targets=ALL)


class FullyShardedDataParallel(nn.Module):
    """What FSDP1 looks like; itself it needs an accelerator."""

    def __init__(self, model):
        super().__init__()
        self._fsdp_wrapped_module = model


def compiled(model):
    return torch.compile(model, backend="eager")


def compiled_tower(model):
    model.visual = compiled(model.visual)
    return model


def distributed_tower(model):
    model.visual = DataParallel(model.visual)
    return model


def checkpointed_blocks(model):
    blocks = model.visual.transformer.resblocks
    for i, block in enumerate(blocks):
        blocks[i] = compiled(block) if i == 0 else checkpoint_wrapper(block)
    return model


AROUND = {
    "compiled": compiled,
    "DataParallel": DataParallel,
    "DDP": DistributedDataParallel,
    "FSDP1": FullyShardedDataParallel,
    "AveragedModel": AveragedModel,
    "ModelEmaV2": ModelEmaV2,
    "ModelEmaV3": ModelEmaV3,
    "compiled DDP": lambda m: compiled(DistributedDataParallel(m)),
    "DDP of compiled": lambda m: DistributedDataParallel(compiled(m)),
    "AveragedModel of DDP": lambda m: AveragedModel(DistributedDataParallel(m)),
    "DataParallel of a compiled tower": lambda m: DataParallel(compiled_tower(m)),
}
INSIDE = {
    "compiled tower": compiled_tower,
    "DataParallel tower": distributed_tower,
    "compiled and checkpointed blocks": checkpointed_blocks,
}
WRAPPERS = AROUND | INSIDE


@pytest.fixture(scope="module", autouse=True)
def one_process(tmp_path_factory):
    """DDP wants a process group; of one process, and gone afterwards."""
    store = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return fastheads.save_adapter(patched("clip", CONFIG), tmp_path_factory.mktemp("saved"))


def clones(state):
    return {name: tensor.clone() for name, tensor in state.items()}


def same(a, b):
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def tokenizer(prompts):
    return texts(len(prompts))


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_patched_model_in_a_wrapper_is_read_as_without(wrap, tmp_path):
    plain, outer = patched("clip", CONFIG), wrap(patched("clip", CONFIG))
    assert fastheads.is_patched(outer)
    assert same(fastheads.adapter_state_dict(outer), fastheads.adapter_state_dict(plain))
    assert same(fastheads.base_state_dict(outer), clip().state_dict())
    assert torch.equal(fastheads.gates(outer), fastheads.gates(plain))
    assert fastheads.explain(outer) == fastheads.explain(plain)
    for parameters in (fastheads.lora_parameters, fastheads.gate_parameters):
        assert all(torch.equal(a, b) for a, b in zip(parameters(outer), parameters(plain), strict=True))
    names = (tokenizer, ["dog", "cat"], ["a {}."])
    assert torch.equal(fastheads.class_text_weights(outer, *names), fastheads.class_text_weights(plain, *names))

    fastheads.save_adapter(outer, tmp_path)
    assert same(read_adapter(tmp_path)[1], dict(sorted(fastheads.adapter_state_dict(plain).items())))
    fresh = fastheads.load_adapter(clip(), tmp_path)
    assert same(fastheads.adapter_state_dict(fresh), fastheads.adapter_state_dict(plain))


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_patched_model_in_a_wrapper_is_loaded_captured_and_disabled_as_without(wrap, saved):
    plain = patched("clip", CONFIG)
    outer = wrap(patched("clip", CONFIG, size=0.3))
    assert fastheads.load_adapter(outer, saved) is outer
    assert same(fastheads.adapter_state_dict(outer), fastheads.adapter_state_dict(plain))
    inner = unwrap(outer).eval()
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        with fastheads.capture_heads(plain.eval()) as expected:
            image = plain.encode_image(images())
        with fastheads.capture_heads(outer) as heads:
            assert torch.equal(inner.encode_image(images()), image)
        assert torch.equal(heads.features, expected.features)
        stock = clip().eval().requires_grad_(False).encode_image(images())
        with fastheads.disabled(outer):
            assert torch.equal(inner.encode_image(images()), stock)


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_weights_are_averaged_through_wrappers_on_either_side(wrap):
    tuned = fastheads.merge(patched("clip", CONFIG))
    expected = fastheads.wise_ft(copy.deepcopy(tuned), clip(), 0.5).state_dict()
    outer = wrap(copy.deepcopy(tuned))
    assert fastheads.wise_ft(outer, clip(), 0.5) is outer
    assert same(fastheads.wise_ft(copy.deepcopy(tuned), wrap(clip()), 0.5).state_dict(), expected)
    if wrap is not distributed_tower:  # its state alone doesn't tell the wrapper from a module named "module"
        state = clones(wrap(clip()).state_dict())
        assert same(fastheads.wise_ft(copy.deepcopy(tuned), state, 0.5).state_dict(), expected)
    fastheads.patch(unwrap(outer))
    assert same(fastheads.base_state_dict(outer), expected)


@pytest.mark.parametrize("name", AROUND)
def test_what_changes_the_model_itself_asks_for_the_one_inside(name, saved):
    kind = type(AROUND[name](clip())).__name__
    for call in (fastheads.patch, lambda m: fastheads.load_adapter(m, saved)):
        with pytest.raises(TypeError, match=f"model: is wrapped in {kind}; patch first"):
            call(AROUND[name](clip()))
    for call in (fastheads.merge, fastheads.unpatch):
        outer = AROUND[name](patched("clip", CONFIG))
        with pytest.raises(TypeError, match=f"model: is wrapped in {kind}; pass the model inside"):
            call(outer)
        assert fastheads.is_patched(outer)


def test_a_sharded_model_is_saved_whole_and_not_loaded_into(saved, tmp_path):
    model = patched("clip", CONFIG)
    for block in model.visual.transformer.resblocks:
        fully_shard(block, mesh=dist.init_device_mesh("cpu", (1,)))
    fastheads.save_adapter(model, tmp_path)
    assert same(read_adapter(tmp_path)[1], read_adapter(saved)[1])
    fastheads.load_adapter(clip(), tmp_path)
    with pytest.raises(TypeError, match="sharded.*load the adapter first"):
        fastheads.load_adapter(model, saved)


def test_a_share_of_the_adapters_is_not_saved(tmp_path):
    """As FSDP1 leaves them outside of its own calls: flat, and some of them empty."""
    model = FullyShardedDataParallel(patched("clip", CONFIG))
    fastheads.lora_parameters(model)[0].data = torch.zeros(7)
    with pytest.raises(TypeError, match="share.*summon_full_params"):
        fastheads.save_adapter(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def flags(model):
    return [p.requires_grad for p in model.parameters()]


@pytest.mark.parametrize("call", [fastheads.merge, fastheads.unpatch])
@pytest.mark.parametrize("wrap", INSIDE.values(), ids=INSIDE)
def test_wrappers_inside_may_come_before_patch_or_after_it(wrap, call):
    trained = patched("clip", CONFIG)
    adapters = fastheads.adapter_state_dict(trained)
    expected = clones(call(copy.deepcopy(trained)).state_dict())
    early, late = clip(), clip()
    for model in (early, late):
        model.visual.lock(unlocked_groups=1)
    before = flags(early)
    wrap(early)
    fastheads.patch(early, CONFIG)
    fastheads.patch(late, CONFIG)
    wrap(late)
    for model in (early, late):
        for name, tensor in fastheads.adapter_state_dict(model).items():
            tensor.copy_(adapters[name])
        call(model)
        assert not fastheads.is_patched(model) and flags(model) == before
        fastheads.patch(model)
        assert same(fastheads.base_state_dict(model), expected)


# ---------------------------------------------------------------------------------------------------- PEFT


def peft_module(**children):
    cls = type("PeftModel", (nn.Module,), {"__module__": "peft.peft_model"})
    outer = cls()
    for name, child in children.items():
        setattr(outer, name, child)
    return outer


def around(model):
    return peft_module(base_model=model)


def inside(model):
    mlp = model.visual.transformer.resblocks[1].mlp
    mlp.c_fc = peft_module(base_layer=mlp.c_fc)
    return model


def marked(model):
    model.peft_config = {}
    return model


def enter(context):
    with contextlib.ExitStack() as stack:
        stack.enter_context(context)


CALLS = {
    "save_adapter": lambda m, folder, _: fastheads.save_adapter(m, folder),
    "load_adapter": lambda m, _, saved: fastheads.load_adapter(m, saved),
    "capture_heads": lambda m, *_: enter(fastheads.capture_heads(m)),
    "disabled": lambda m, *_: enter(fastheads.disabled(m)),
    "explain": lambda m, *_: fastheads.explain(m),
    "patch": lambda m, *_: fastheads.patch(m),
    "unpatch": lambda m, *_: fastheads.unpatch(m),
    "merge": lambda m, *_: fastheads.merge(m),
    "gates": lambda m, *_: fastheads.gates(m),
    "lora_parameters": lambda m, *_: fastheads.lora_parameters(m),
    "gate_parameters": lambda m, *_: fastheads.gate_parameters(m),
    "adapter_state_dict": lambda m, *_: fastheads.adapter_state_dict(m),
    "base_state_dict": lambda m, *_: fastheads.base_state_dict(m),
}


@pytest.mark.parametrize("wrap", [around, inside, marked, lambda m: DataParallel(around(m))])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_peft_around_or_inside_a_patched_model_is_refused(call, wrap, saved, tmp_path):
    outer = wrap(patched("clip", CONFIG))
    assert fastheads.is_patched(outer)  # a question, and it has an answer
    with pytest.raises(TypeError, match="model: is wrapped (by PEFT.*merge_and_unload|in DataParallel)"):
        call(outer, tmp_path / "a", saved)
    assert fastheads.is_patched(outer) and not (tmp_path / "a").exists()


@pytest.mark.parametrize("wrap", [around, inside])
def test_peft_around_or_inside_a_model_to_average_is_refused(wrap):
    with pytest.raises(TypeError, match="by PEFT.*merge_and_unload"):
        fastheads.wise_ft(wrap(clip()), clip(), 0.5)


def test_a_state_dict_loads_where_peft_is_around():
    """Only our own calls refuse it."""
    outer = around(patched("clip", CONFIG))
    outer.load_state_dict(outer.state_dict())
