"""Which heads of a frozen model to close: those whose outputs differ most between domains. Nothing is trained."""

import open_clip
import torch
import torch.nn.functional as F

import fastheads

NAME, CLASSES = "ViT-B-16-quickgelu", ["dog", "elephant", "giraffe"]

model = open_clip.create_model(NAME, pretrained="openai").eval()
classifier = fastheads.class_text_weights(model, open_clip.get_tokenizer(NAME), CLASSES)
fastheads.patch(model, fastheads.HeadConfig(rank=0, gate="sigmoid"))  # gates alone, all 1
images, labels = torch.randn(12, 3, 224, 224), torch.arange(12) % len(CLASSES)  # in place of yours
domains = torch.arange(3).repeat_interleave(4)

with torch.no_grad():
    with fastheads.capture_heads(model) as heads:
        model.encode_image(images)
    says = heads.features.transpose(1, 2).flatten(0, 1)  # [layers · heads, N, head_dim]
    pairs = fastheads.mmd(says, domains, num_domains=3, reduction="none")  # [layers · heads, 3, 3]
    apart = pairs.sum((1, 2))
    per_layer = heads.features.shape[2]
    worst = [divmod(i, per_layer) for i in apart.argsort(descending=True).tolist()]  # (layer, head)

    for count in range(6):  # choose the count on held-out images of the domains you have
        with fastheads.masked(model, worst[:count]):
            answers = (F.normalize(model.encode_image(images), dim=-1) @ classifier.T).argmax(-1)
        print(f"{count} closed, {worst[:count]}: {(answers == labels).float().mean().item():.0%} right")
