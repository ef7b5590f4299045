"""Layers to checkpoint, schedules of forwards and backwards, and both checkpoint functions on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lazy_transfer import LazyTransfer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastft_plugins.checkpointing import OffloadCheckpoint
from fastft_plugins.kernels import transfer as transfer_module

Checkpoint = Callable[..., Any]
WIDTH = 8
DEVICE = torch.device("cpu")  # tests on a GPU set another one


class Layer(nn.Module):
    """A residual layer with dropout, so that the random state matters."""

    def __init__(self, seed: int, width: int = WIDTH) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(0.25)
        self.to(DEVICE)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        out: Tensor = x + scale * self.dropout(self.down(torch.tanh(self.up(x * x))))
        return out


class Stack(nn.Module):
    """Checkpointed layers, one after the other."""

    def __init__(self, depth: int = 4, width: int = WIDTH) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(index, width) for index in range(depth))

    def forward(self, x: Tensor, checkpoint_fn: Checkpoint) -> Tensor:
        for layer in self.layers:
            x = checkpoint_fn(layer, x, use_reentrant=False)
        return x


def make_input(seed: int, rows: int = 5, width: int = WIDTH) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)).to(DEVICE).requires_grad_()


def stock(function: Any, *args: Any, use_reentrant: bool | None = False, **kwargs: Any) -> Any:
    return checkpoint(function, *args, use_reentrant=use_reentrant, **kwargs)


def lazy_engine(monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[OffloadCheckpoint, LazyTransfer]:
    """An engine that offloads tensors on the CPU, however small, through a `LazyTransfer`."""
    lazy = LazyTransfer()
    monkeypatch.setattr(transfer_module, "why_no_transfer", lambda device: None)
    monkeypatch.setattr(transfer_module, "make_transfer", lambda device: lazy)
    return OffloadCheckpoint(**({"min_bytes": 0, "budget": 2**30} | options)), lazy


def gradients(module: nn.Module, *inputs: Tensor) -> list[Tensor | None]:
    return [tensor.grad for tensor in (*inputs, *module.parameters())]


def assert_same(ours: list[Tensor | None], theirs: list[Tensor | None]) -> None:
    assert len(ours) == len(theirs)
    for index, (got, expected) in enumerate(zip(ours, theirs, strict=True)):
        assert (got is None) == (expected is None), index
        assert got is None or expected is None or torch.equal(got, expected), f"gradient {index} differs"


# Schedules. Each takes a checkpoint function and returns all gradients that came of it.


def plain(checkpoint_fn: Checkpoint) -> list[Tensor | None]:
    model, x = Stack(), make_input(0)
    model(x, checkpoint_fn).sum().backward()
    return gradients(model, x)


def several_steps(checkpoint_fn: Checkpoint) -> list[Tensor | None]:
    model, found = Stack(), []
    for step in range(4):
        model.zero_grad()
        x = make_input(step, rows=5 + step % 2)
        model(x, checkpoint_fn).square().sum().backward()
        found += [None if grad is None else grad.clone() for grad in gradients(model, x)]
    return found


def accumulated_forwards(checkpoint_fn: Checkpoint) -> list[Tensor | None]:
    model, x, y, z = Stack(), make_input(0), make_input(1), make_input(2)
    outs = [model(tensor, checkpoint_fn) for tensor in (x, y, z)]
    sum(out.square().sum() for out in outs).backward()  # type: ignore[union-attr]
    return gradients(model, x, y, z)


def overtaking(checkpoint_fn: Checkpoint) -> list[Tensor | None]:
    """Forward A, forward B, backward B, forward C, backward A, backward C."""
    model, a, b, c = Stack(), make_input(0), make_input(1), make_input(2)
    out_a, out_b = model(a, checkpoint_fn), model(b, checkpoint_fn)
    out_b.sum().backward()
    out_c = model(c, checkpoint_fn)
    out_a.sum().backward()
    out_c.sum().backward()
    return gradients(model, a, b, c)


def layer_by_layer(checkpoint_fn: Checkpoint) -> list[Tensor | None]:
    """Two models whose layers take turns, and backward one after the other."""
    one, two, x, y = Stack(3), Stack(3), make_input(0), make_input(1)
    a: Tensor = x
    b: Tensor = y
    for left, right in zip(one.layers, two.layers, strict=True):
        a, b = checkpoint_fn(left, a, use_reentrant=False), checkpoint_fn(right, b, use_reentrant=False)
    a.sum().backward()
    b.sum().backward()
    return gradients(one, x) + gradients(two, y)


def nested(checkpoint_fn: Checkpoint) -> list[Tensor | None]:
    model, x = Stack(4), make_input(0)
    first, second = model.layers[:2], model.layers[2:]

    def block(layers: nn.ModuleList) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            for layer in layers:
                x = checkpoint_fn(layer, x, use_reentrant=False)
            return x

        return run

    out = checkpoint_fn(block(first), x, use_reentrant=False)
    out = checkpoint_fn(block(second), out, use_reentrant=False)
    out.sum().backward()
    return gradients(model, x)


def retained(checkpoint_fn: Checkpoint) -> list[Tensor | None]:
    model, x = Stack(), make_input(0)
    loss = model(x, checkpoint_fn).square().sum()
    loss.backward(retain_graph=True)
    loss.backward()
    return gradients(model, x)


def evaluated_between(checkpoint_fn: Checkpoint) -> list[Tensor | None]:
    model, x = Stack(), make_input(0)
    out = model(x, checkpoint_fn)
    with torch.no_grad():
        model(make_input(1), checkpoint_fn)
    out.sum().backward()
    return gradients(model, x)


def dropped_graph(checkpoint_fn: Checkpoint) -> list[Tensor | None]:
    """A forward whose graph is thrown away, one whose backward stops half-way, then a whole step."""
    model, x = Stack(), make_input(0)
    model(make_input(1), checkpoint_fn)
    half = make_input(2)
    middle = checkpoint_fn(model.layers[0], half, use_reentrant=False)
    out = middle
    for layer in model.layers[1:]:
        out = checkpoint_fn(layer, out, use_reentrant=False)
    grads = torch.autograd.grad(out.sum(), [middle])
    del out, middle
    model(x, checkpoint_fn).sum().backward()
    return [*grads, *gradients(model, x)]


def failing_layer(checkpoint_fn: Checkpoint) -> list[Tensor | None]:
    """A forward that raises, a backward that raises, then a whole step."""
    model, x = Stack(), make_input(0)

    def fails(x: Tensor) -> Tensor:
        raise KeyError("forward")

    with pytest.raises(KeyError):
        checkpoint_fn(fails, model(make_input(1), checkpoint_fn), use_reentrant=False)

    def fail(grad: Tensor) -> None:
        raise ValueError("backward")

    middle = checkpoint_fn(model.layers[0], make_input(2), use_reentrant=False)
    middle.register_hook(fail)
    with pytest.raises(ValueError, match="backward"):
        checkpoint_fn(model.layers[1], middle, use_reentrant=False).sum().backward()
    model.zero_grad()
    model(x, checkpoint_fn).sum().backward()
    return gradients(model, x)


def autocast(checkpoint_fn: Checkpoint) -> list[Tensor | None]:
    model, x = Stack(), make_input(0)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        out = model(x, checkpoint_fn)
    out.float().sum().backward()
    return gradients(model, x)


def without_input_gradient(checkpoint_fn: Checkpoint) -> list[Tensor | None]:
    model, x = Stack(), make_input(0).detach()
    model(x, checkpoint_fn).sum().backward()
    return gradients(model)


def second_order(checkpoint_fn: Checkpoint) -> list[Tensor | None]:
    model, x = Stack(2), make_input(0)
    (grad,) = torch.autograd.grad(model(x, checkpoint_fn).square().sum(), [x], create_graph=True)
    grad.square().sum().backward()
    return gradients(model, x)


def transposed(checkpoint_fn: Checkpoint) -> list[Tensor | None]:
    """An input whose memory is not in the order of its dimensions; the function asks for that order."""
    model, x = Layer(0, 5), make_input(0)

    def function(x: Tensor) -> Tensor:
        assert x.stride() == (1, WIDTH), x.stride()
        return model(x)

    checkpoint_fn(function, (2 * x).t(), use_reentrant=False).sum().backward()
    return gradients(model, x)


SCHEDULES: list[Callable[[Checkpoint], list[Tensor | None]]] = [
    plain, several_steps, accumulated_forwards, overtaking, layer_by_layer, nested, retained, evaluated_between,
    dropped_graph, failing_layer, autocast, without_input_gradient, second_order, transposed,
]  # fmt: skip


def assert_as_stock(schedule: Callable[[Checkpoint], list[Tensor | None]], checkpoint_fn: Checkpoint) -> None:
    """Three times in a row, the schedule gives the gradients and the random state of torch's checkpointing."""
    found: list[list[Tensor | None]] = []
    for each in (stock, checkpoint_fn):
        torch.manual_seed(1)
        found.append([grad for _ in range(3) for grad in schedule(each)])
        found[-1].append(torch.get_rng_state())
    assert_same(*found)
