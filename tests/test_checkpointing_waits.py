"""No wait is there for nothing: the engine with any one of them taken out fails a schedule.

The mutants are made from the source, so a wait that is added later is tested too.
"""

from __future__ import annotations

import ast
import gc
import inspect
import types

import pytest
import torch
from checkpointing_helpers import SCHEDULES, lazy_engine, stock

from fastft_plugins.checkpointing import handle as handle_module
from fastft_plugins.checkpointing import offloaded as offloaded_module

SOURCE = inspect.getsource(offloaded_module)


class WithoutWait(ast.NodeTransformer):
    """Takes out the wait with the number ``number``: a call of ``wait``, or the mark after which a copy begins."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.found: list[int] = []

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.func, ast.Attribute) and node.func.attr == "wait":
            return ast.Constant(None) if self._is_the_one(node) else node
        for keyword in node.keywords:
            if keyword.arg == "after" and self._is_the_one(node):
                keyword.value = ast.Constant(None)
        return node

    def _is_the_one(self, node: ast.AST) -> bool:
        self.found.append(node.lineno)
        return len(self.found) - 1 == self.number


def waits() -> list[int]:
    """The lines of all waits."""
    finder = WithoutWait(-1)
    finder.visit(ast.parse(SOURCE))
    return finder.found


def mutant(number: int) -> types.ModuleType:
    tree = ast.fix_missing_locations(WithoutWait(number).visit(ast.parse(SOURCE)))
    module = types.ModuleType("mutant")
    exec(compile(tree, "mutant", "exec"), vars(module))
    return module


def problems(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is wrong in the schedules: wrong gradients, or copies into memory of others."""
    found = []
    for schedule in SCHEDULES:
        ours, lazy = lazy_engine(monkeypatch)
        torch.manual_seed(1)
        expected = schedule(stock)
        torch.manual_seed(1)
        got = schedule(ours)
        gc.collect()
        lazy.drain()
        pairs = zip(got, expected, strict=True)
        if not all(a is b is None or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs):
            found.append(f"{schedule.__name__}: wrong gradients")
        found += [f"{schedule.__name__}: {what}" for what in lazy.corrupted]
    return found


def test_the_engine_itself_has_no_problem(monkeypatch):
    assert len(waits()) >= 4
    monkeypatch.setattr(handle_module, "Offloaded", mutant(-1).Offloaded)
    assert problems(monkeypatch) == []


@pytest.mark.parametrize("number", range(len(waits())), ids=[f"line {line}" for line in waits()])
def test_the_engine_without_one_wait_fails(number, monkeypatch):
    monkeypatch.setattr(handle_module, "Offloaded", mutant(number).Offloaded)
    assert problems(monkeypatch)


def test_host_memory_is_freed_only_after_its_copies(monkeypatch):
    """Freeing waits for the queue: a copy whose host memory is gone would write anywhere."""
    ours, lazy = lazy_engine(monkeypatch, budget=4096)
    x = torch.randn(8, 8, requires_grad=True)
    ours(torch.sin, x)  # the graph is dropped at once, its copy is still queued
    ours(torch.sin, torch.randn(64, 64, requires_grad=True))  # needs the room
    ours.close()
    assert lazy.live == [] and lazy.corrupted == []
