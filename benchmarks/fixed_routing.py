"""One choice of experts for every run of a model: recorded in the first, given to the routers of the others."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_ROUTER = "GptOssTopKRouter"
_PADDING = -1  # in place of an expert's number: padding, where the router's own choice stays

# How the choices of each document, [tokens, k], lie in a batch: [tokens of the batch, k].
Layout = Callable[[list[Tensor]], Tensor]


def row_layout(choices: list[Tensor]) -> Tensor:
    """One row of the documents without padding."""
    return torch.cat(choices)


def padded_layout(choices: list[Tensor]) -> Tensor:
    """A row for each document, padded on the right."""
    return nn.utils.rnn.pad_sequence(choices, batch_first=True, padding_value=_PADDING).flatten(0, 1)


class FixedRouting:
    """Hooks on all routers of ``model``. The weights of the experts are still computed from each run's own logits.

    A checkpointed layer runs its router twice, so all that is kept is kept by place and not in the order of calls.
    """

    def __init__(self, model: nn.Module) -> None:
        self._document: int | None = None
        self._recorded: dict[str, dict[int, Tensor]] = defaultdict(dict)
        self._given: dict[str, Tensor] = {}
        self._flips: dict[str, Tensor] = {}
        routers = {name: module for name, module in model.named_modules() if type(module).__name__ == _ROUTER}
        if not routers:
            raise ValueError(f"{type(model).__name__} has no {_ROUTER}")
        for name, router in routers.items():
            router.register_forward_hook(self._hook(name))

    def forget(self) -> None:
        """Before other documents are recorded."""
        self._recorded.clear()

    def record(self, document: int) -> None:
        """From here on the routers choose themselves, and it is kept as the choice for this document."""
        self._document = document

    def give(self, layout: Layout) -> None:
        """From here on they choose what was recorded."""
        self._document = None
        self._given = {
            name: layout([choices[number] for number in sorted(choices)]) for name, choices in self._recorded.items()
        }

    def flips(self) -> float:
        """The share of tokens for which, in the run just made, a layer's router would have chosen other experts."""
        tokens = sum(int((ids_TK[:, 0] != _PADDING).sum()) for ids_TK in self._given.values())
        return sum(int(flips) for flips in self._flips.values()) / tokens

    def _hook(self, name: str) -> Callable[..., Any]:
        def hook(router: nn.Module, inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> Any:
            logits_TE, _, own_TK = output
            if self._document is not None:
                self._recorded[name][self._document] = own_TK
                return output
            given_TK = self._given[name]
            ids_TK = torch.where(given_TK == _PADDING, own_TK, given_TK)
            self._flips[name] = (own_TK.sort(1).values != ids_TK.sort(1).values).any(1).sum()
            # As the router itself makes them from its own choice.
            weights_TK = torch.softmax(logits_TE.gather(1, ids_TK), dim=1, dtype=logits_TE.dtype)
            return logits_TE, weights_TK, ids_TK

        return hook
