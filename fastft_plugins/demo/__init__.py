"""The demonstration: one model fine-tuned twice on the same real data, by the stock Trainer and with fastft."""

from __future__ import annotations

from fastft_plugins.demo.compare import DemoSettings, run_demo

__all__ = ["DemoSettings", "run_demo"]
