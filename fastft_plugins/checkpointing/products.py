"""Selective checkpointing: a layer's costly products are stored, and looked up when the layer runs again.

A matrix product of inner width K costs K operations for each byte of its bf16 output, all else in a layer a few. Torch
has the same idea in `create_selective_checkpoint_contexts`; here only products are looked at, those that the backward
never asks for are not stored, what is looked up has been checked first, and a graph that is kept can run backward
twice, as with torch's plain checkpoint.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from fastft_plugins.checkpointing.offloaded import Offloaded, alias, is_held
from fastft_plugins.checkpointing.product_modes import LookingUp, Storing, is_there
from fastft_plugins.kernels.download import Download

if TYPE_CHECKING:
    from fastft_plugins.checkpointing.handle import Handle

MIN_BYTES = 2**20  # what is smaller stays on the device
_MISSES = 8  # forwards in a row with another number of products, and the layer is another one
_CHANGED = object()


class LayerProducts:
    """Which products of one layer are stored, and the contexts of its calls.

    The first time, products are stored but computed again as well, and only those that came out the same, bit by bit,
    are looked up from then on: a kernel may have written over one without torch's knowing. Products that the recompute
    does not come to are not stored any more.
    """

    def __init__(self) -> None:
        self._total: int | None = None  # of a forward; None before the first recompute has ended
        self._found: tuple[list[int], Download | None] = [], None  # in the first recompute, not waited for
        self._trusted: set[int] | None = None
        self._misses = 0

    @property
    def is_known(self) -> bool:
        """Whether its first recompute has ended, and the host has learned what came out the same in it."""
        if self._trusted is None and self._total is not None:
            indices, download = self._found
            same = [] if download is None else download.get()
            if same is not None:
                self._trusted = {index for index, is_same in zip(indices, same, strict=True) if is_same}
        return self._trusted is not None

    def contexts(
        self, handle: Handle | None = None, *, offloaded: frozenset[int] = frozenset(), stores_others: bool = True
    ) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """For the ``context_fn`` of torch's checkpoint: of one call's forward, and of each time it runs again.

        Args:
            handle: of what the call offloads.
            offloaded: the products, by their number in the forward, that are stored in host memory.
            stores_others: whether all others are stored on the device.
        """
        trusted = self._trusted if self.is_known else None
        call = Call(self, trusted, handle, offloaded if handle is not None else frozenset(), stores_others)
        return Storing(call), LookingUp(call)

    def learn(self, total: int, is_same: dict[int, Tensor]) -> None:
        """A first recompute has ended."""
        if self._total is None:
            flags = [*is_same.values()]  # a layer may have products on several devices
            if flags:
                self._found = list(is_same), Download(torch.stack([flag.to(flags[0].device) for flag in flags]))
            self._total = total  # last, as a forward in another thread may ask

    def has(self, total: int) -> bool:
        """Whether a forward with so many products is like the one that was learned from."""
        self._misses = 0 if self._total == total else self._misses + 1
        return not self._misses

    @property
    def is_outdated(self) -> bool:
        """Whether the layer has changed for good, as when an adapter has been put in or taken out."""
        return self._misses >= _MISSES


class Call:
    """The products of one call of a layer."""

    def __init__(
        self,
        layer: LayerProducts,
        trusted: set[int] | None,
        handle: Handle | None,
        offloaded: frozenset[int],
        stores_others: bool,
    ) -> None:
        self.layer, self.trusted = layer, trusted
        self.total = 0
        self.outputs: dict[int, tuple[Any, Any, list[int]]] = {}  # operation, aliases, versions, by index
        self._handle, self._offloaded, self._stores_others = handle, offloaded, stores_others

    def store(self, op: Any, outputs: Any) -> None:
        """Keep the forward's next product, if it is to be looked up."""
        index, self.total = self.total, self.total + 1
        if (self.trusted is not None and index not in self.trusted) or not _is_plain(outputs):
            return
        aliases = tree_map_only(Tensor, alias, outputs)
        # What has not been checked yet is not copied: a kernel that writes over it would race with the copy.
        if self.trusted is not None and index in self._offloaded:
            aliases = self._offload(aliases)
        elif not self._stores_others:
            return
        if aliases is not None:
            self.outputs[index] = op, aliases, _versions(aliases)

    def end_forward(self) -> None:
        """Let go of what cannot be looked up, on another path than the one that was learned, or should not be."""
        is_other = self.trusted is not None and not self.layer.has(self.total)
        for index, (_, outputs, _) in list(self.outputs.items()):
            # What somebody holds after the layer's forward may be changed where no mode and no version tells.
            if is_other or _is_held(outputs):
                self._drop(index)

    def look_up(self, index: int, op: Any) -> Any:
        """A product of the forward, once; None if it is not there, or not as it was."""
        stored_by, outputs, versions = self.outputs.get(index, (None, None, []))
        if stored_by is not op or versions != _versions(outputs):
            return None
        del self.outputs[index]
        leaves, structure = tree_flatten(outputs)
        leaves = [self._take(leaf) for leaf in leaves]
        return None if any(leaf is _CHANGED for leaf in leaves) else tree_unflatten(leaves, structure)

    def forget(self, written: Tensor) -> None:
        """What shares memory with a tensor that is written to; versions do not tell, as not all views share them."""
        memory = written.untyped_storage().data_ptr()
        for index, (_, outputs, _) in list(self.outputs.items()):
            if any(_shares(leaf, memory) for leaf in tree_leaves(outputs)):
                self._drop(index)

    def forget_all(self) -> None:
        """Nothing will be looked up any more."""
        for index in list(self.outputs):
            self._drop(index)

    def _drop(self, index: int) -> None:
        _, outputs, _ = self.outputs.pop(index)
        self._stay(tree_leaves(outputs))

    def _stay(self, leaves: list[Any]) -> None:
        """Those of them that are offloaded do not come back."""
        if self._handle is not None:
            self._handle.forget(leaf for leaf in leaves if isinstance(leaf, Offloaded))

    def _offload(self, aliases: Any) -> Any:
        """The same with handles of what is offloaded in place of the large tensors; None if there is no room."""
        assert self._handle is not None
        leaves, structure = tree_flatten(aliases)
        large = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.nbytes >= MIN_BYTES]
        for index in large:
            offloaded = self._handle.offload_product(leaves[index])
            if offloaded is None:
                break
            leaves[index] = offloaded
        else:
            if large:
                return tree_unflatten(leaves, structure)
        self._stay(leaves)
        return aliases if self._stores_others else None

    def _take(self, leaf: Any) -> Any:
        if isinstance(leaf, Offloaded):
            assert self._handle is not None
            tensor = self._handle.take_product(leaf)
            return _CHANGED if tensor is None else tensor
        return leaf


def _shares(leaf: Any, memory: int) -> bool:
    if isinstance(leaf, Offloaded):
        return leaf.shares(memory)
    return is_there(leaf) and leaf.untyped_storage().data_ptr() == memory


def _is_held(outputs: Any) -> bool:
    """Whether a product's memory is another tensor's too. Of attention's outputs, only the first one leaves it."""
    first = next(leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor | Offloaded))
    return first.is_held() if isinstance(first, Offloaded) else is_held(first)


def _is_plain(outputs: Any) -> bool:
    """Whether they are torch's own tensors in memory: of others, what is compared and copied says little."""
    tensors = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
    return all(type(leaf) is Tensor and leaf.layout == torch.strided for leaf in tensors)


def _versions(outputs: Any) -> list[int]:
    return [leaf._version for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
