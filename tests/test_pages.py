"""README, guides and examples: their code runs as it stands, on tiny models of random weights in place of pretrained
ones, and their commands are ones that the command line takes."""

import json
import re
import runpy
import shlex
from pathlib import Path

import open_clip
import pytest
import timm
import torch
from pictures import few_icons
from standins import seeded
from timm.models.vision_transformer import VisionTransformer

import fastheads
from fastheads.cli import arguments

ROOT = Path(__file__).parents[1]
PAGES = sorted(p for p in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")))
# What has tests of its own: models and loaders there are the README's, or a graph is captured.
ELSEWHERE = {"docs/memory.md": "tests/ops/test_models.py", "docs/cuda-graphs.md": "tests/test_cuda_graphs.py"}
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
# Started by their own tests, with options.
OWN_ARGUMENTS = {
    "accelerate_loop.py",
    "ddp.py",
    "domainbed_algorithm.py",
    "lightning_module.py",
    "openclip_training.py",
}

# As many layers and heads as ViT-B/16, so that what pages say of layer 11 and head 3 is there.
TINY = {
    "embed_dim": 32,
    "vision_cfg": {"layers": 12, "width": 96, "head_width": 8, "image_size": 224, "patch_size": 56, "mlp_ratio": 1.0},
    "text_cfg": {"layers": 1, "width": 32, "heads": 4, "context_length": 77, "vocab_size": 49408},
}


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands(page):
    """What follows `fastheads` at the beginning of a line of a block, fenced or indented, or a launcher there."""
    indented = re.findall(r"^ {4}(?:.*\n {4})*.*", page.read_text(encoding="utf-8"), re.MULTILINE)
    text = "\n".join([*blocks(page, "bash"), *indented])
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    found = [re.match(r" *(?:(?:accelerate launch|torchrun) .* -m fastheads|fastheads) ([^…]*)$", ln) for ln in lines]
    return [line[1] for line in found if line]


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """Every OpenCLIP and timm model is a tiny one, with the same random weights each time; in an empty folder."""
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", dict(open_clip.factory._MODEL_CONFIGS))
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", list(open_clip.factory._MODEL_CONFIG_PATHS))
    open_clip.add_model_config(tmp_path / "tiny.json")
    create, with_transforms = open_clip.create_model, open_clip.create_model_and_transforms

    def tiny_model(name, pretrained=None, make=create):
        assert name in open_clip.list_models()
        with seeded(0):
            return make("tiny")

    def tiny_timm(name, pretrained=False, num_classes=1000):
        assert timm.is_model(name)
        with seeded(0):
            return VisionTransformer(
                224, 56, embed_dim=96, depth=12, num_heads=12, mlp_ratio=1, num_classes=num_classes
            )

    monkeypatch.setattr(open_clip, "create_model", tiny_model)
    monkeypatch.setattr(
        open_clip, "create_model_and_transforms", lambda *a, **k: tiny_model(*a, **k, make=with_transforms)
    )
    monkeypatch.setattr(timm, "create_model", tiny_timm)
    one = {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "localhost", "MASTER_PORT": 0}
    for name, value in one.items():  # as torchrun sets it
        monkeypatch.setenv(name, str(value))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def named(path):
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python") and named(p) not in ELSEWHERE], ids=named)
def test_a_pages_code_runs_from_top_to_bottom(page, tiny):
    domains = torch.arange(6) % 3
    names = {"loader": [(torch.randn(6, 3, 224, 224), domains, domains)] * 2}  # all that a page leaves to its reader
    for block in blocks(page, "python"):
        exec(compile(block, named(page), "exec"), names)


@pytest.mark.parametrize("page", [p for p in PAGES if commands(p)], ids=named)
def test_the_command_line_takes_a_pages_commands(page):
    for line in commands(page):
        arguments.parser().parse_args(shlex.split(line, comments=True))


@pytest.mark.parametrize("example", [e for e in EXAMPLES if e.name not in OWN_ARGUMENTS], ids=named)
def test_an_example_runs(example, tiny, capsys):
    runpy.run_path(str(example), run_name="__main__")
    assert re.search(r"\d", capsys.readouterr().out)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=named)
def test_a_notebook_runs_from_top_to_bottom_and_is_kept_without_outputs(notebook, monkeypatch, tmp_path, capsys):
    """On few of the demo's icons, by the model that comes with the package."""
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.chdir(tmp_path)
    few_icons(monkeypatch)
    text = notebook.read_text(encoding="utf-8")
    tiny = text.replace("most=3, images=100", "most=1, images=4")
    assert tiny != text
    cells = [c for c in json.loads(tiny)["cells"] if c["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells)
    names = {}
    for cell in cells:
        exec(compile("".join(cell["source"]), named(notebook), "exec"), names)
    assert "closed (layer, head)" in capsys.readouterr().out and not fastheads.is_patched(names["stock"])
