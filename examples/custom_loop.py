"""A loop of your own: wrap the collator, and train inside ``apply(model)``."""

from __future__ import annotations

import torch
from tiny import ROWS, pad, tiny_model
from torch.utils.data import DataLoader

from fastft_plugins import apply
from fastft_plugins.packing import PaddingFreeCollator

model = tiny_model().train()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
loader = DataLoader(ROWS, batch_size=8, collate_fn=PaddingFreeCollator(pad))
with apply(model) as run:
    for batch in loader:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"loss {loss.item():.3f}")
print(run.report)
