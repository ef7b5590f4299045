"""Whether a demo's report.json holds what is shown of it."""

from __future__ import annotations

from typing import Any

from fastft_plugins.errors import FastFTConfigError
from fastft_plugins.report import Report
from fastft_plugins.saved_values import check

_RUN = {
    "losses": [float],
    "step_seconds": [float],
    "median_step_seconds": float,
    "real_tokens_per_second": float,
    "peak_memory_bytes": float,
    "seconds?": float,
    "cpu_seconds?": float,
}
_RESULT = {
    **dict.fromkeys(("model", "data", "trained", "device"), str),
    "settings": dict.fromkeys(("steps", "batch_size", "seed"), int),
    "real_tokens": [int],
    "padded_tokens": [int],
    **dict.fromkeys(
        (
            "padding_share",
            "speedup",
            "largest_relative_loss_difference",
            "largest_weight_difference",
            "weight_difference_over_update",
        ),
        float,
    ),
    "stock": _RUN,
    "fastft": _RUN,
}


def check_result(result: dict[str, Any]) -> None:
    """Raise unless ``result`` can be shown.

    Raises:
        FastFTConfigError: names the field and what is wrong with it.
    """
    try:
        check(result, _RESULT)
        check(result, {"fastft_report": {}})
        Report.from_dict(result["fastft_report"])
        steps = len(result["stock"]["losses"])
        if not steps:
            raise FastFTConfigError("stock.losses is [], not one number a step")
        per_step = {"fastft.losses": result["fastft"]["losses"]} | {
            name: result[name] for name in ("real_tokens", "padded_tokens")
        }
        for name, values in per_step.items():
            if len(values) != steps:
                raise FastFTConfigError(f"{name} has {len(values)} entries, and stock.losses {steps}")
    except FastFTConfigError as error:
        raise FastFTConfigError(f"a demo's report, but not complete ({error})") from error
