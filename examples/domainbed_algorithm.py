"""HAP as an algorithm of DomainBed's, and DomainBed's own training script with it among the others.

    PYTHONPATH=DomainBed python examples/domainbed_algorithm.py --algorithm HAP --data_dir data --dataset PACS \\
        --test_envs 3 --output_dir out --hparams '{"model": "ViT-B-16-quickgelu", "pretrained": "openai",
        "class_names": ["dog", "elephant", "giraffe", "guitar", "horse", "house", "person"], "lr": 2e-4}'

All options are the script's. Of the hparams these are HAP's own: model, pretrained, class_names (in the order of the
class folders), mmd_weight, gate_lr; lr and weight_decay are DomainBed's.
"""

import runpy

import open_clip
import torch
import torch.nn.functional as F
from domainbed import algorithms

import fastheads
from fastheads.losses import class_text_weights
from fastheads.train.methods import ImageEncoder, Objective, class_logits
from fastheads.train.optimization import parameter_groups

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # DomainBed's, in which images come


class HAP(algorithms.Algorithm):
    """Head-aware LoRA and gates, which the MMD between the environments of a step trains."""

    def __init__(self, input_shape, num_classes, num_domains, hparams):
        super().__init__(input_shape, num_classes, num_domains, hparams)
        names = hparams.get("class_names", ())
        if len(names) != num_classes:
            raise ValueError(f"hparams: got class_names {names!r}; takes {num_classes}, as the data set has")
        name = hparams.get("model", "ViT-B-16-quickgelu")
        self.model = open_clip.create_model(name, pretrained=hparams.get("pretrained"))
        classifier = class_text_weights(self.model, open_clip.get_tokenizer(name), names, ["a photo of a {}."])
        self.scale = float(self.model.logit_scale.detach().exp())
        fastheads.patch(self.model)
        images = open_clip.model.get_model_preprocess_cfg(self.model)
        self.size = images["size"] if isinstance(images["size"], int) else images["size"][0]
        own, theirs = (torch.tensor(each).view(2, 3, 1, 1) for each in ((images["mean"], images["std"]), (MEAN, STD)))
        self.register_buffer("classifier", classifier)
        self.register_buffer("factor", theirs[1] / own[1])
        self.register_buffer("shift", (theirs[0] - own[0]) / own[1])
        self.objective = Objective(classifier, self.scale, num_domains, mmd_weight=hparams.get("mmd_weight", 0.1))
        rates = {"lr": hparams["lr"], "gate_lr": hparams.get("gate_lr", 2e-3), "weight_decay": hparams["weight_decay"]}
        self.optimizer = torch.optim.AdamW(parameter_groups(self.model, **rates))

    def update(self, minibatches, unlabeled=None):
        images, labels = (torch.cat(parts) for parts in zip(*minibatches, strict=True))
        sizes = torch.tensor([len(y) for _, y in minibatches], device=labels.device)
        domains = torch.arange(len(minibatches), device=labels.device).repeat_interleave(sizes)
        self.objective.classifier = self.classifier  # where the algorithm was moved to
        losses = self.objective(ImageEncoder(self.model), self.model, self.prepared(images), labels, domains)
        self.optimizer.zero_grad()
        losses["loss"].backward()
        self.optimizer.step()
        return {name: loss.item() for name, loss in losses.items()}

    def predict(self, x):
        return class_logits(self.model.encode_image(self.prepared(x)), self.classifier, self.scale)

    def prepared(self, images):
        """In the model's size and normalisation."""
        images = images if images.shape[-1] == self.size else F.interpolate(images, self.size, mode="bicubic")
        return images * self.factor + self.shift


algorithms.HAP = HAP
algorithms.ALGORITHMS.append("HAP")

if __name__ == "__main__":
    runpy.run_module("domainbed.scripts.train", run_name="__main__", alter_sys=True)
