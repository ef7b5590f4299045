"""Forward hooks that a run puts on somebody else's modules."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastft_plugins.run import Run


class RunHook:
    """A hook on a forward that belongs to ``run``. A copy or pickle of it does nothing: copies of a model are stock."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def __reduce__(self) -> Any:
        # A callable of the standard library that takes any arguments and returns None: loads without fastft.
        return getattr, (contextlib.nullcontext(), "__exit__")
