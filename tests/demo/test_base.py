"""The demo's base model: shipped, loaded without a network, missed in words; what captions can say."""

import json
import socket

import open_clip
import pytest
import torch

from fastheads.demo import base, icons


def test_registered_twice_it_is_one_model_with_its_own_tokenizer():
    base.register()
    base.register()
    assert base.MODEL in open_clip.list_models()
    tokenizer = open_clip.get_tokenizer(base.MODEL)
    assert tokenizer.vocab_size == json.loads(base.CONFIG.read_text())["text_cfg"]["vocab_size"]
    model = open_clip.create_model(base.MODEL)
    assert len(model.visual.transformer.resblocks) == 6 and model.visual.image_size == (48, 48)


def test_every_caption_fits_the_context():
    base.register()
    tokenizer = open_clip.get_tokenizer(base.MODEL)
    names = [name.replace("-", " ") for name in icons.drawings()["art"]]
    captions = [saying.format(name) for saying in base.sayings() for name in names]
    assert (tokenizer(captions)[:, -1] == 0).all()  # a caption cut short would end in a full row
    assert len(set(captions)) == len(captions) and base.PROMPT in base.sayings()


def test_no_caption_names_a_domain_and_every_domain_has_its_own():
    assert not any(domain in saying for saying in base.sayings() for domain in icons.DOMAINS)
    assert set(base.LOOK_WORDS) == set(icons.DOMAINS)
    for words in base.LOOK_WORDS.values():
        told, opposed = base.sayings(words), base.sayings(base.opposite(words))
        assert len(told) == len(opposed) == 2 ** len(words) - 1
        assert set(told) | set(opposed) < set(base.sayings()) and set(told).isdisjoint(opposed)
        assert all(any(word in saying for word in words.values()) for saying in told)


def test_the_shipped_model_knows_icons_without_a_network(monkeypatch):
    """Six pictures of houses and keys in each domain, among all names; nothing is downloaded."""
    monkeypatch.setattr(socket, "socket", lambda *_, **__: pytest.fail("the network was asked"))
    model = base.load().eval()
    names = [name.replace("-", " ") for name in icons.drawings()["art"]]
    tokenizer = open_clip.get_tokenizer(base.MODEL)
    right = []
    with torch.no_grad():
        text = model.encode_text(tokenizer([base.PROMPT.format(name) for name in names]), normalize=True)
        for domain in icons.DOMAINS:
            for name in ("house", "key"):
                glyph = icons.drawings()[domain][name][0]
                pictures = [torch.from_numpy(icons.picture(domain, glyph, n)) for n in range(4)]
                images = torch.nn.functional.interpolate(
                    torch.stack(pictures).permute(0, 3, 1, 2).float() / 255, 48, mode="area"
                )
                mean, std = (
                    torch.tensor(values).view(3, 1, 1)
                    for values in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
                )
                features = model.encode_image((images - mean) / std, normalize=True)
                right += ((features @ text.T).argmax(1) == names.index(name)).tolist()
    assert sum(right) / len(right) > 0.4  # chance: 1 in 71


def test_captions_tell_the_looks_apart(tmp_path):
    """The words of a look match its pictures better than their opposites: what CAR-FT's contexts rest on."""
    model = base.load().eval()
    tokenizer = open_clip.get_tokenizer(base.MODEL)
    mean, std = (
        torch.tensor(values).view(3, 1, 1) for values in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    )
    names = list(icons.drawings()["art"])[::6]
    for domain, axis, word in (("neon", "tone", 0), ("sketch", "tone", 1), ("sketch", "ground", 0), ("art", "form", 1)):
        pictures = [icons.picture(domain, icons.drawings()[domain][name][0], 0) for name in names]
        images = torch.stack([torch.from_numpy(picture) for picture in pictures]).permute(0, 3, 1, 2).float() / 255
        images = torch.nn.functional.interpolate(images, 48, mode="area")
        with torch.no_grad():
            features = model.encode_image((images - mean) / std, normalize=True)
            said = [
                model.encode_text(
                    tokenizer([base.caption(name.replace("-", " "), **{axis: value}) for name in names]), normalize=True
                )
                for value in base.AXES[axis]
            ]
        matched = torch.stack([(features * each).sum(1) for each in said]).argmax(0) == word
        assert matched.float().mean() > 0.6, (domain, axis)


def test_the_checkpoint_says_which_recipe_made_it():
    from safetensors import safe_open

    from fastheads.demo.pretraining import Recipe, recipe_hash

    with safe_open(base.CHECKPOINT, "pt") as file:
        assert file.metadata() == {"recipe": recipe_hash(Recipe()), "steps": str(Recipe().steps)}
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float16}  # noqa: SIM118
    assert base.CHECKPOINT.stat().st_size <= 6e6
    assert "CC BY" in base.CHECKPOINT.with_name("NOTICE").read_text()


@pytest.mark.parametrize("fault", ["missing", "truncated", "of another model"])
def test_a_checkpoint_that_cannot_be_used_is_told_in_words(fault, tmp_path, monkeypatch):
    path = tmp_path / "fastheads-demo.safetensors"
    if fault == "truncated":
        path.write_bytes(b"\x00" * 100)
    if fault == "of another model":
        from safetensors.torch import save_file

        save_file({"weight": torch.zeros(2)}, path)
    monkeypatch.setattr(base, "CHECKPOINT", path)
    with pytest.raises((FileNotFoundError, ValueError), match=f"{path}.*reinstall fastheads"):
        base.load()
