"""The demo's result in a sentence, and whether it can be trusted."""

from __future__ import annotations

from typing import Any

from fastft_plugins.demo.figures import quotient
from fastft_plugins.report import Report

LOSSES_AGREE = 1e-3  # relative; in bf16, two orders of the same sums differ by a few 1e-4
TIMES_AGREE = 1.3


def headline(result: dict[str, Any]) -> tuple[str, bool]:
    """Return the sentence, and whether it is good news: faster, with the same losses, on a quiet machine."""
    difference = result["largest_relative_loss_difference"]
    do_agree = difference <= LOSSES_AGREE
    if difference == 0:
        losses = "losses identical"
    else:
        losses = f"losses {'equal to' if do_agree else 'differ by up to'} {difference:.0e} relative"
    reason = _reason_for_staying_off(result)
    if reason is not None:
        return f"fastft stayed off: {reason}; {losses}", False
    text = f"{result['speedup']:.2f}x the speed of the stock Trainer, {losses}"
    return text, result["speedup"] > 1 and do_agree and busy_note(result) is None


def busy_note(result: dict[str, Any]) -> str | None:
    """Say so if other programs slowed one of the two runs: its clock went on while its processors worked elsewhere."""
    stock, fastft = result["stock"], result["fastft"]
    if not all("seconds" in run and "cpu_seconds" in run for run in (stock, fastft)):
        return None
    by_clock, by_cpu = (quotient(stock[name], fastft[name]) for name in ("seconds", "cpu_seconds"))
    apart = max(quotient(by_clock, by_cpu), quotient(by_cpu, by_clock))
    if apart <= TIMES_AGREE:
        return None
    return (
        f"the machine was busy: {by_clock:.2f}x by the clock, {by_cpu:.2f}x by processor time; "
        "run the demo again when nothing else is running"
    )


def _reason_for_staying_off(result: dict[str, Any]) -> str | None:
    features = Report.from_dict(result["fastft_report"]).features
    return None if any(feature.enabled for feature in features.values()) else features["packing"].reason
