"""The demo's CLIP: a stock OpenCLIP model that learns, is cached, and never sees the domains."""

import json
from collections.abc import Iterator
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import load_file

from fastheads.demo import digits, pretrain


@pytest.fixture(scope="module", autouse=True)
def small_recipe() -> Iterator[None]:
    """Few drawings and small batches: these tests are about the steps, not about accuracy."""
    partition = digits.partition
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "partition", lambda seed: {"pretraining": partition(seed)["pretraining"][::8]})
        patch.setattr(pretrain, "Recipe", _SmallRecipe)
        yield


class _SmallRecipe(pretrain.Recipe):
    def __init__(self, **fields: int) -> None:
        super().__init__(**{"batch": 16, **fields})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pretrain.pretrain(tmp_path_factory.mktemp("cache"), steps=3)


def test_register_twice_makes_a_model_with_enough_layers_and_heads() -> None:
    pretrain.register()
    pretrain.register()
    assert pretrain.MODEL in open_clip.list_models()
    assert sum(path == pretrain.CONFIG for path in open_clip.factory._MODEL_CONFIG_PATHS) <= 1
    model = open_clip.create_model(pretrain.MODEL)
    blocks = model.visual.transformer.resblocks
    assert len(blocks) >= 4
    assert all(block.attn.num_heads >= 4 for block in blocks)
    assert open_clip.get_tokenizer(pretrain.MODEL)(["a"]).shape == (1, 16)


def test_every_caption_fits_the_context() -> None:
    pretrain.register()
    tokenizer = open_clip.get_tokenizer(pretrain.MODEL)
    captions = [template.format(name) for template in pretrain.TEMPLATES for name in digits.CLASSES]
    # a caption cut short would end in a full row
    assert (tokenizer(captions)[:, -1] == 0).all()
    assert len(set(captions)) == len(captions)
    assert pretrain.PROMPT in pretrain.TEMPLATES


def test_no_template_names_a_domain() -> None:
    assert not any(domain in template for template in pretrain.TEMPLATES for domain in digits.DOMAINS)


def test_stock_open_clip_loads_the_checkpoint(checkpoint: Path) -> None:
    model, _, preprocess = open_clip.create_model_and_transforms(pretrain.MODEL, pretrained=str(checkpoint))
    saved = load_file(checkpoint)
    assert saved.keys() == model.state_dict().keys()
    assert all(torch.equal(saved[name], value) for name, value in model.state_dict().items())
    normalize = preprocess.transforms[-1]
    assert tuple(normalize.mean) == pretrain.OPENAI_DATASET_MEAN
    assert tuple(normalize.std) == pretrain.OPENAI_DATASET_STD


def test_a_second_call_takes_the_checkpoint_from_the_cache(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrain, "_train", lambda *_: pytest.fail("trained again"))
    assert pretrain.pretrain(checkpoint.parent, steps=3) == checkpoint
    assert list(checkpoint.parent.iterdir()) == [checkpoint]


def test_the_same_recipe_gives_the_same_weights(checkpoint: Path, tmp_path: Path) -> None:
    random_state = torch.get_rng_state()
    again = pretrain.pretrain(tmp_path, steps=3)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert again.name == checkpoint.name
    assert again.read_bytes() == checkpoint.read_bytes()


def test_another_recipe_gets_another_file() -> None:
    names = {
        pretrain._recipe_hash(pretrain.Recipe(**fields))
        for fields in ({}, {"steps": 4}, {"seed": 1}, {"digits_seed": 1})
    }
    assert len(names) == 4


def test_an_interrupted_training_leaves_nothing(tmp_path: Path) -> None:
    def stop(step: int, steps: int, loss: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pretrain.pretrain(tmp_path, steps=3, progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_the_loss_falls(tmp_path: Path) -> None:
    seen: list[tuple[int, int, float]] = []
    pretrain.pretrain(tmp_path, steps=20, progress=lambda *report: seen.append(report))
    assert [report[:2] for report in seen] == [(step, 20) for step in range(1, 21)]
    losses = [loss for *_, loss in seen]
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])


def test_matching_loss_equals_clips_where_every_partner_is_single() -> None:
    logits = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
    target = torch.arange(5)
    clip = (torch.nn.functional.cross_entropy(logits, target) + torch.nn.functional.cross_entropy(logits.T, target)) / 2
    torch.testing.assert_close(pretrain.matching_loss(logits, torch.eye(5).bool()), clip)


def test_the_config_is_an_open_clip_config() -> None:
    config = json.loads(pretrain.CONFIG.read_text())
    assert {"embed_dim", "vision_cfg", "text_cfg"} == config.keys()
