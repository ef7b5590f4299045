"""Every hook is documented, and implemented in a test that calls it; a new hook without these fails here."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pluggy
import pytest

from fastft_plugins import hookspecs
from fastft_plugins.hookspecs import hookimpl
from fastft_plugins.manager import PluginManager

ROOT = Path(__file__).parent.parent
HOOKS: dict[str, Callable[..., Any]] = {
    name: function for name, function in vars(hookspecs).items() if hasattr(function, "fastft_spec")
}


def implemented_in(source: str) -> Iterator[str]:
    """Yield the names of the functions that carry `hookimpl`, with or without arguments."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            for decorator in node.decorator_list:
                called = decorator.func if isinstance(decorator, ast.Call) else decorator
                if ast.unparse(called).split(".")[-1] == "hookimpl":
                    yield node.name


class Recorder:
    """Implements every hook and remembers what it was given."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []

    @hookimpl
    def fastft_matches(self, target: Any) -> str:
        self.calls.append(("fastft_matches", {"target": target}))
        return "matched"

    @hookimpl
    def fastft_features(self) -> list[str]:
        self.calls.append(("fastft_features", {}))
        return ["a feature"]

    @hookimpl
    def fastft_kernels(self, op: str) -> list[str]:
        self.calls.append(("fastft_kernels", {"op": op}))
        return ["a kernel"]

    @hookimpl
    def fastft_inject_metadata(self, run: Any, wrap_collator: Any) -> str:
        self.calls.append(("fastft_inject_metadata", {"run": run, "wrap_collator": wrap_collator}))
        return "collator wrapped"

    @hookimpl
    def fastft_inject_reloader(self, run: Any, checkpoint_fn: Any) -> str:
        self.calls.append(("fastft_inject_reloader", {"run": run, "checkpoint_fn": checkpoint_fn}))
        return "checkpointing replaced"

    @hookimpl
    def fastft_inject_router(self, run: Any, experts_fn: Any) -> str:
        self.calls.append(("fastft_inject_router", {"run": run, "experts_fn": experts_fn}))
        return "experts replaced"


def test_the_hooks_are_those_of_the_contract() -> None:
    assert set(HOOKS) == {
        "fastft_matches",
        "fastft_features",
        "fastft_kernels",
        "fastft_inject_metadata",
        "fastft_inject_reloader",
        "fastft_inject_router",
    }
    functions = {name for name in vars(hookspecs) if name.startswith("fastft_")}
    assert functions == set(HOOKS), "a function named like a hook lacks @hookspec"


@pytest.mark.parametrize("hook", HOOKS)
class TestEveryHook:
    def test_has_a_docstring_and_annotations(self, hook: str) -> None:
        signature = inspect.signature(HOOKS[hook])
        assert inspect.getdoc(HOOKS[hook])
        assert signature.return_annotation is not inspect.Signature.empty
        for parameter in signature.parameters.values():
            assert parameter.annotation is not inspect.Parameter.empty, f"{hook}: {parameter.name} has no annotation"

    def test_is_in_the_architecture_document(self, hook: str) -> None:
        assert re.search(rf"\b{hook}\b", (ROOT / "docs/architecture.md").read_text())

    def test_is_implemented_in_a_test(self, hook: str) -> None:
        assert any(hook in implemented_in(file.read_text()) for file in ROOT.glob("tests/**/test_*.py"))

    @pytest.mark.parametrize("through", ["hook", "call_each"])
    def test_passes_its_arguments_and_returns_the_result(
        self, hook: str, through: str, plugin_manager: PluginManager, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("FASTFT_PLUGINS", "built-in")
        recorder = Recorder()
        plugin_manager.register(recorder, "recorder")
        arguments: dict[str, Any] = {name: f"the {name}" for name in inspect.signature(HOOKS[hook]).parameters}
        if through == "hook":
            results = getattr(plugin_manager.hook, hook)(**arguments)
            first = results if isinstance(results, str) else results[0]  # a str from the firstresult hook
        else:
            plugin, first = plugin_manager.call_each(hook, **arguments)[0]
            assert plugin == "recorder"
        assert recorder.calls == [(hook, arguments)]
        assert first == getattr(Recorder(), hook)(**arguments)

    def test_refuses_an_implementation_with_other_arguments(self, hook: str, plugin_manager: PluginManager) -> None:
        def misfit(wheel: Any) -> None: ...

        plugin = type("Misfit", (), {hook: staticmethod(hookimpl(misfit))})()
        with pytest.raises(pluggy.PluginValidationError, match="wheel"):
            plugin_manager.register(plugin)


def test_the_scan_sees_only_marked_functions() -> None:
    source = """
@hookimpl
def one(): ...
@hookspecs.hookimpl(tryfirst=True)
def two(): ...
@staticmethod
def three(): ...
def four(): ...
"""
    assert list(implemented_in(source)) == ["one", "two"]
