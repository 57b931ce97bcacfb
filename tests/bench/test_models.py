"""docs/models.md says of models what the code does."""

import pytest

from bench.base.checkout import ROOT
from bench.base.tables import read_block
from bench.models import ROW, names


def documented(library):
    block = read_block((ROOT / "docs" / "models.md").read_text(encoding="utf-8"), library)
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines() if line.startswith("|")
    ]
    return {row[0]: row for row in rows[2:]}


def test_every_model_has_a_row():
    for library, models in names().items():
        assert list(documented(library)) == models, "python -m bench.models --doc docs/models.md"


@pytest.mark.parametrize(
    ("library", "model", "kind"),
    [
        ("open_clip", "ViT-B-16", "fused"),
        ("open_clip", "ViT-B-16-SigLIP", "fused"),
        ("open_clip", "EVA02-B-16", "fused: gates would not fold"),
        ("open_clip", "RN50", "refused"),
        ("open_clip", "roberta-ViT-B-32", "fused"),
        ("timm", "deit_tiny_patch16_224", "fused"),
        ("timm", "beit_base_patch16_224", "fused"),
        ("timm", "vit_dwee_patch16_reg1_gap_256", "refused"),
        ("huggingface", "openai/clip-vit-base-patch16", "fused"),
        ("huggingface", "google/siglip2-so400m-patch16-naflex", "fused"),
        ("huggingface", "google/mt5-base", ""),
    ],
)
def test_a_row_is_what_the_code_says(library, model, kind):
    if library == "huggingface":
        pytest.importorskip("transformers", reason="needs transformers: make test-hf")
    row = ROW[library](model)
    assert documented(library)[model] == row
    assert row[2].startswith(kind)
