"""Three lines in a training loop of your own: patch, capture the heads, add the MMD between domains."""

import open_clip
import torch
import torch.nn.functional as F

import fastheads

NAME, CLASSES = "ViT-B-16-quickgelu", ["dog", "elephant", "giraffe"]


def batches(steps=2, per_domain=4, domains=3):
    """In place of your loader: images of several domains, their classes, and which domain each is of."""
    for _ in range(steps):
        ids = torch.arange(domains).repeat_interleave(per_domain)
        yield torch.randn(len(ids), 3, 224, 224), torch.randint(len(CLASSES), ids.shape), ids


model = open_clip.create_model(NAME, pretrained="openai")
print(fastheads.patch(model))  # 1
classifier = fastheads.class_text_weights(model, open_clip.get_tokenizer(NAME), CLASSES)
optimizer = torch.optim.AdamW(
    [
        {"params": fastheads.lora_parameters(model), "lr": 2e-4, "weight_decay": 0.1},
        {"params": fastheads.gate_parameters(model), "lr": 2e-3, "weight_decay": 0.0},
    ]
)
for images, labels, domains in batches():
    with fastheads.capture_heads(model) as heads:  # 2
        features = model.encode_image(images)
    logits = model.logit_scale.exp() * F.normalize(features, dim=-1) @ classifier.T
    loss = F.cross_entropy(logits, labels) + 0.1 * fastheads.head_mmd(heads, domains, num_domains=3)  # 3
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"loss {loss.item():.3f}")

fastheads.save_adapter(model, "adapter", base=f"{NAME} openai")
torch.save(fastheads.merge(model).state_dict(), "merged.pt")  # a stock model again
