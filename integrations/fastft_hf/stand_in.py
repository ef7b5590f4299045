"""A config for one module of a model, in which a run's function is named instead of stock's; the module without it."""

from __future__ import annotations

import copy
import operator
from typing import Any


class StandInConfig:
    """``stock`` with some attributes replaced. A copy or pickle of it is ``stock`` itself: copies of a model are stock.

    What is read and not replaced comes from ``stock`` at that moment, and what is set goes there;
    ``_fastft_stock_config`` is ``stock``.
    """

    def __init__(self, stock: Any, **replaced: Any) -> None:
        vars(self).update(replaced, _fastft_stock_config=stock)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_fastft_stock_config"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._fastft_stock_config.__setattr__(name, value)  # the user's own change, which a run does not undo

    def __copy__(self) -> Any:
        return copy.copy(self._fastft_stock_config)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return operator.getitem, ((self._fastft_stock_config,), 0)


class StockModule:
    """A module with a `StandInConfig` as stock's functions know it: with the config ``stock``, otherwise the module.

    A function that serves several implementations reads in the config which of them it is to be.
    """

    def __init__(self, module: Any) -> None:
        vars(self).update(_module=module, config=module.config._fastft_stock_config)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_module"], name)


def stock_config(module: Any) -> Any:
    """The module's config as it is without a run."""
    config = module.config
    return vars(config).get("_fastft_stock_config", config)
