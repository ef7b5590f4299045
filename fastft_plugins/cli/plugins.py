"""The table of ``fastft plugins``."""

from __future__ import annotations

from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table

from fastft_plugins.manager import PluginStatus

_STYLE = {"loaded": "green", "failed": "red", "disabled": "dim"}


def table(statuses: Sequence[PluginStatus]) -> Table:
    """Return one row a plugin; one that is not in use shows why in place of its hooks."""
    result = Table()
    for name in ("plugin", "from", "version", "state", "hooks, or what went wrong"):
        result.add_column(name, overflow="fold")
    for status in statuses:
        state = f"[{_STYLE[status.state]}]{status.state}[/]"
        detail = escape(status.error) if status.error else "\n".join(status.hooks)
        if status.state == "disabled":
            detail = "switched off by FASTFT_PLUGINS"
        result.add_row(escape(status.name), escape(status.source), status.version or "", state, detail)
    return result
