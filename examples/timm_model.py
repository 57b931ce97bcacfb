"""A vision transformer of timm's, with a linear head in place of text."""

import timm
import torch
import torch.nn.functional as F

import fastheads

model = timm.create_model("vit_base_patch16_224", pretrained=True, num_classes=7)
print(fastheads.patch(model))
model.get_classifier().requires_grad_(True)  # patch froze it with the rest
optimizer = torch.optim.AdamW(
    [
        {"params": [*fastheads.lora_parameters(model), *model.get_classifier().parameters()], "lr": 2e-4},
        {"params": fastheads.gate_parameters(model), "lr": 2e-3, "weight_decay": 0.0},
    ]
)
for _ in range(2):
    images, labels, domains = torch.randn(12, 3, 224, 224), torch.randint(7, (12,)), torch.arange(12) % 3  # yours
    with fastheads.capture_heads(model) as heads:
        logits = model(images)
    loss = F.cross_entropy(logits, labels) + 0.1 * fastheads.head_mmd(heads, domains, num_domains=3)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"loss {loss.item():.3f}")

fastheads.save_adapter(model, "adapter", modules_to_save=["head"])  # the head travels along
torch.save(fastheads.merge(model).state_dict(), "merged.pt")
