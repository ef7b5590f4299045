"""Every change made to somebody else's object, and its undo.

Changes are undone in reverse order. An attribute that somebody else replaced in the meantime is left as it is and
noted: putting the old value back would throw their change away.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Hashable
from typing import Any

logger = logging.getLogger("fastft")

_MISSING = object()
# Reentrant: inside `share` the garbage collector may end another run, whose undo steps take it too.
_lock = threading.RLock()
_holders: defaultdict[Hashable, set[object]] = defaultdict(set)  # by key, one object for each run that needs the change
_installed: set[Hashable] = set()


class Ledger:
    """A stack of undo steps. `close` runs them all, whatever any one of them raises, and may be called twice."""

    def __init__(self) -> None:
        self._undo: list[tuple[str, Callable[[], None]]] = []
        self.notes: list[str] = []

    def __len__(self) -> int:
        return len(self._undo)

    def record(self, what: str, undo: Callable[[], None]) -> None:
        """Remember ``undo`` for a change already made; ``what`` names it for messages."""
        self._undo.append((what, undo))

    def setattr(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute of one instance to an object that can be weakly referenced: a function, a config.

        The undo deletes the attribute if the instance itself had none before.
        """
        what = f"{type(owner).__name__}.{name}"
        before = vars(owner).get(name, _MISSING)
        # Weak, so that an undo step never keeps a trainer or a model alive.
        owner_ref, value_ref = weakref.ref(owner), weakref.ref(value)

        def undo() -> None:
            owner = owner_ref()
            if owner is None:
                return
            if value_ref() is None or vars(owner).get(name, _MISSING) is not value_ref():
                self.notes.append(f"{what} was changed by someone else during the run and is left as it is")
            elif before is _MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, before)

        setattr(owner, name, value)
        self.record(what, undo)

    def share(self, key: Hashable, install: Callable[[], None], remove: Callable[[], None]) -> None:
        """Make a process-wide change once for all the runs that need it; the last of them to end removes it."""
        holder = object()

        def undo() -> None:
            with _lock:
                _holders[key].discard(holder)
                if not _holders[key] and key in _installed:
                    _installed.discard(key)
                    remove()

        with _lock:
            _holders[key].add(holder)  # first: a run that ends from here on is no longer the last
            if key not in _installed:
                try:
                    install()
                except BaseException:
                    _holders[key].discard(holder)
                    raise
                _installed.add(key)
        self.record(str(key), undo)

    @contextlib.contextmanager
    def all_or_nothing(self) -> Any:
        """Undo what was recorded inside the block if the block raises."""
        mark = len(self._undo)
        try:
            yield
        except BaseException:
            self._unwind(mark)
            raise

    def close(self) -> None:
        """Undo everything, last change first."""
        self._unwind(0)

    def _unwind(self, mark: int) -> None:
        interrupt: BaseException | None = None
        while len(self._undo) > mark:
            what, undo = self._undo.pop()
            try:
                undo()
            except Exception as error:  # the other undo steps must still run
                self.notes.append(f"{what} could not be restored: {error}")
                logger.exception("fastft: %s could not be restored", what)
            except BaseException as error:  # a second Ctrl-C, say: it waits until everything is restored
                self.notes.append(f"{what} was interrupted while it was restored")
                interrupt = interrupt or error
        if interrupt is not None:
            raise interrupt
