"""CAR-FT on a patched model: the adapted model keeps the original's sense of an image's context."""

import open_clip
import torch
import torch.nn.functional as F

import fastheads

NAME, CLASSES = "ViT-B-16-quickgelu", ["dog", "elephant", "giraffe"]

model = open_clip.create_model(NAME, pretrained="openai")
tokenizer = open_clip.get_tokenizer(NAME)
fastheads.patch(model)
classifier = fastheads.class_text_weights(model, tokenizer, CLASSES)
contexts = fastheads.context_text_weights(model, tokenizer, CLASSES)  # OpenCLIP's 80 templates
optimizer = torch.optim.AdamW(fastheads.lora_parameters(model) + fastheads.gate_parameters(model), lr=2e-4)
scale = model.logit_scale.exp().detach()

for _ in range(2):
    images, labels = torch.randn(6, 3, 224, 224), torch.randint(len(CLASSES), (6,))  # your batches
    with fastheads.disabled(model), torch.no_grad():  # the teacher is the same model without its adapters
        original = model.encode_image(images)
    features = model.encode_image(images)
    loss = F.cross_entropy(scale * F.normalize(features, dim=-1) @ classifier.T, labels)
    loss = loss + fastheads.context_kl(features, original, contexts, scale)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"loss {loss.item():.3f}")
