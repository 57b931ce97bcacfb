"""The MMD between domains on any features, without a patched model."""

import torch
from torch import nn

import fastheads

encoder = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32))
optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-3)
domains = torch.arange(96) % 3  # sizes may differ
inputs = torch.randn(96, 64) + domains[:, None]  # each domain is shifted

for step in range(20):
    loss = fastheads.mmd(encoder(inputs), domains, num_domains=3)  # or kernel="domainbed", "dan", numbers of your own
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 5 == 0:
        print(f"step {step:2d}: MMD² {loss.item():.4f}")

pairs = fastheads.mmd(encoder(inputs), domains, reduction="none")  # [1, S, S], of every pair
print(pairs[0].detach())
