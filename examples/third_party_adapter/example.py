"""A trainer that brings its own plugin. Install it first: pip install examples/third_party_adapter"""

from __future__ import annotations

from mini_trainer import MiniTrainer
from tiny import ROWS, pad, tiny_model

from fastft_plugins import apply

stock, trainer = MiniTrainer(tiny_model(), ROWS, pad), MiniTrainer(tiny_model(), ROWS, pad)
stock.fit()
with apply(trainer) as run:
    trainer.fit()
largest = max(abs(ours - theirs) for ours, theirs in zip(trainer.losses, stock.losses, strict=True))
print(f"largest difference of a loss from the stock run: {largest:.1e}")
print(run.report)
