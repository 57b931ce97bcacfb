"""The examples run: loops of one's own, on any number of processes, Lightning's where it is installed, and OpenCLIP's
training script."""

import csv
import logging
import sys
import types

import open_clip
import pytest
import torch
from pictures import write_set
from processes import free_port, on_ranks
from ranks import example, example_on_rank
from safetensors.torch import load_file

from fastheads.demo.base import MODEL, register


@pytest.fixture
def root(tmp_path):
    return write_set(tmp_path / "set")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "accelerate_loop", "lightning_module"])
def test_a_loop_of_ones_own_gives_the_same_adapter_on_one_process_and_on_two(root, tmp_path, name):
    own = ["--devices"] if name == "lightning_module" else []
    if own:
        pytest.importorskip("pytorch_lightning")
    found = []
    for world in (1, 2):
        out = tmp_path / f"on{world}"
        argv = [
            root,
            MODEL,
            "--target",
            "photo",
            "--steps",
            3,
            "--workers",
            0,
            "--per-domain",
            4,
            "--mmd-weight",
            10,
            "--out",
            out,
        ]
        on_ranks(example_on_rank, world, world, free_port(), name, list(map(str, argv + own + [world] * len(own))))
        found.append(load_file(out / "adapter_model.safetensors"))
    assert any(name.endswith("theta") and tensor.any() for name, tensor in found[0].items())
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, atol=1e-5, rtol=0)


def test_hap_is_an_algorithm_of_domainbeds(monkeypatch):
    """In a stand-in of that harness: what it calls, on images in its normalisation and of another size."""
    register()

    class Algorithm(torch.nn.Module):
        def __init__(self, input_shape, num_classes, num_domains, hparams):
            super().__init__()
            self.hparams = hparams

    algorithms = types.SimpleNamespace(Algorithm=Algorithm, ALGORITHMS=[])
    monkeypatch.setitem(sys.modules, "domainbed", types.SimpleNamespace(algorithms=algorithms))
    example("domainbed_algorithm")
    hparams = {"model": MODEL, "class_names": ["dog", "house"], "lr": 1e-2, "weight_decay": 0.0, "mmd_weight": 1.0}
    assert algorithms.ALGORITHMS == ["HAP"]
    with pytest.raises(ValueError, match="takes 3, as the data set has"):
        algorithms.HAP((3, 28, 28), 3, 3, hparams)
    torch.manual_seed(0)
    hap = algorithms.HAP((3, 28, 28), 2, 3, hparams)
    frozen = {name: p.clone() for name, p in hap.named_parameters() if not p.requires_grad}
    minibatches = [(torch.randn(n, 3, 28, 28), torch.arange(n) % 2) for n in (4, 2, 4)]
    seen = [hap.update(minibatches) for _ in range(8)]
    assert seen[0].keys() == {"loss", "cross_entropy", "mmd"} and seen[-1]["cross_entropy"] < seen[0]["cross_entropy"]
    assert all(p.equal(frozen[name]) for name, p in hap.named_parameters() if name in frozen)
    assert all(p.grad.any() for p in hap.parameters() if p.requires_grad)
    with torch.no_grad():
        assert hap.predict(minibatches[0][0]).shape == (4, 2)
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    white = hap.prepared((torch.ones(1, 3, 28, 28) - mean) / std)
    own = open_clip.model.get_model_preprocess_cfg(hap.model)
    assert torch.allclose(white[0, :, 5, 5], (1 - torch.tensor(own["mean"])) / torch.tensor(own["std"]), atol=1e-5)


def test_open_clips_training_script_trains_adapters(root, tmp_path):
    pytest.importorskip("pandas")
    pytest.importorskip("webdataset")
    register()
    with open(tmp_path / "images.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["path", "caption", "domain"])
        for path in sorted(root.rglob("*.png")):
            table.writerow([path, f"a {path.parts[-2]}", path.parts[-3]])
    options = {"train-data": tmp_path / "images.csv", "dataset-type": "csv", "csv-separator": ","}
    options |= {"csv-img-key": "path", "csv-caption-key": "caption", "model": MODEL, "batch-size": 6, "epochs": 2}
    options |= {"logs": tmp_path / "logs", "name": "run", "workers": 0, "warmup": 1, "lr": 0.01, "device": "cpu"}
    argv = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    random, handlers = torch.get_rng_state(), logging.root.handlers[:]
    loggers = [logging.root, *map(logging.getLogger, logging.root.manager.loggerDict)]
    levels = [logger.level for logger in loggers]
    try:
        example("openclip_training").main([*argv, "--precision", "fp32"])
    finally:  # the script sets up the process as its own
        torch.set_rng_state(random)
        logging.root.handlers[:] = handlers
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
    adapter = load_file(tmp_path / "logs" / "adapter" / "adapter_model.safetensors")
    assert all(tensor.any() for name, tensor in adapter.items() if name.endswith(("lora_B", "theta")))
    log = (tmp_path / "logs" / "run" / "out.log").read_text()
    assert "Mmd: " in log and "Contrastive_loss: " in log and (tmp_path / "logs/run/checkpoints/epoch_2.pt").exists()
