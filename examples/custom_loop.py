"""A loop of your own: train inside ``apply(model)``, with the collator of its run."""

from __future__ import annotations

import torch
from tiny import ROWS, pad, tiny_model
from torch.utils.data import DataLoader

from fastft_plugins import apply

model = tiny_model().train()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
with apply(model) as run:
    loader = DataLoader(ROWS, batch_size=8, collate_fn=run.collator(pad))  # ``pad`` itself where the run does not pack
    for batch in loader:
        loss = model(**{name: value.to(model.device) for name, value in batch.items()}).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"loss {loss.item():.3f}")
print(run.report)
