"""Plugins are found through real distributions' metadata, written into a temporary folder of the import path."""

from __future__ import annotations

import logging
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pluggy
import pytest

from fastft_plugins import manager as manager_module
from fastft_plugins.errors import Declined, FastFTError
from fastft_plugins.hookspecs import hookimpl
from fastft_plugins.manager import PluginManager, PluginStatus, get_plugin_manager

Install = Callable[..., None]

GOOD = """
    from fastft_plugins.hookspecs import hookimpl

    @hookimpl
    def fastft_features():
        return ["a feature of {name}"]
"""
BROKEN = {
    "import error": (
        "import no_such_module_anywhere",
        "ModuleNotFoundError: No module named 'no_such_module_anywhere'",
    ),
    "exception": ("raise RuntimeError('no luck')", "RuntimeError: no luck"),
    "exit": ("import sys; sys.exit(3)", "SystemExit: 3"),
    "syntax error": ("def fastft_features(:", "SyntaxError"),
    "wrong signature": (GOOD.replace("()", "(run, speed)"), "PluginValidationError"),
    "unknown hook": (GOOD.replace("features", "featurez"), "PluginValidationError: unknown hook 'fastft_featurez'"),
    "half good": (
        GOOD + "\n    @hookimpl\n    def fastft_matches(wheel):\n        return True\n",
        "PluginValidationError",
    ),
}


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Install a plugin: its module and the metadata that pip would write."""
    modules_before = set(sys.modules)

    def write(name: str, source: str = GOOD, *, module: str | None = None, distribution: str | None = None) -> None:
        distribution = distribution or f"{name}-distribution"
        module = module or f"{name}_module"
        file = tmp_path.joinpath(*module.split(".")).with_suffix(".py")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(textwrap.dedent(source).replace("{name}", name))
        metadata = tmp_path / f"{distribution.replace('-', '_')}-1.2.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\n")
        (metadata / "entry_points.txt").write_text(f"[fastft]\n{name} = {module}\n")
        monkeypatch.syspath_prepend(tmp_path)

    yield write
    for name in set(sys.modules) - modules_before:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


def status_of(manager: PluginManager, name: str) -> PluginStatus:
    (status,) = [status for status in manager.statuses if status.name == name]
    return status


def features(manager: PluginManager) -> list[Any]:
    return [feature for found in manager.hook.fastft_features() for feature in found]


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


class Plugin:
    """A plugin whose implementation does as the test says."""

    def __init__(self, act: Callable[[], Any]) -> None:
        self.act = act

    @hookimpl
    def fastft_inject_metadata(self, run: Any) -> Any:
        return self.act()


@pytest.fixture
def only_built_in(plugin_manager: PluginManager, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTFT_PLUGINS", "built-in")


class TestLoading:
    def test_nothing_is_loaded_until_it_is_needed(self, plugin_manager: PluginManager, install: Install) -> None:
        install("good")
        assert "good_module" not in sys.modules
        assert "a feature of good" in features(plugin_manager)
        assert "good_module" in sys.modules

    def test_statuses(self, plugin_manager: PluginManager, install: Install) -> None:
        install("good")
        assert plugin_manager.statuses[0].name == plugin_manager.statuses[0].source == "built-in"
        assert {"fastft_features", "fastft_kernels"} <= set(plugin_manager.statuses[0].hooks)
        expected = PluginStatus("good", "good-distribution", "1.2", "loaded", None, ("fastft_features",))
        assert status_of(plugin_manager, "good") == expected

    @pytest.mark.parametrize("kind", BROKEN)
    def test_a_broken_plugin_is_isolated_and_listed(
        self, kind: str, plugin_manager: PluginManager, install: Install, caplog: pytest.LogCaptureFixture
    ) -> None:
        source, error = BROKEN[kind]
        install("a_first")
        install("broken", source)
        install("c_last")
        found = features(plugin_manager)
        assert "a feature of a_first" in found and "a feature of c_last" in found
        assert "a feature of broken" not in found
        status = status_of(plugin_manager, "broken")
        assert (status.state, status.source, status.hooks) == ("failed", "broken-distribution", ())
        assert status.error is not None and status.error.startswith(error)
        (warning,) = warnings_in(caplog)
        for part in ("'broken'", "broken-distribution", error):
            assert part in warning

    @pytest.mark.parametrize("kind", BROKEN)
    def test_strict_raises_the_failure_every_time(
        self, kind: str, plugin_manager: PluginManager, install: Install, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        source, error = BROKEN[kind]
        install("broken", source)
        monkeypatch.setenv("FASTFT_STRICT_PLUGINS", "1")
        for _ in range(2):
            with pytest.raises(FastFTError) as raised:
                plugin_manager.statuses  # noqa: B018
            message = str(raised.value)
            assert message.startswith(f"plugin 'broken' (broken-distribution) failed to load: {error}")
            assert "\n" not in message

    def test_two_plugins_of_one_name(self, plugin_manager: PluginManager, install: Install) -> None:
        install("good", module="one_module", distribution="one")
        install("good", module="other_module", distribution="other")
        states = [(status.state, status.error) for status in plugin_manager.statuses if status.name == "good"]
        assert sorted(state for state, _ in states) == ["failed", "loaded"]
        assert any("registered already" in str(error) for _, error in states)
        assert features(plugin_manager).count("a feature of good") == 1

    def test_a_plugin_may_ask_for_the_manager_while_it_is_imported(
        self, plugin_manager: PluginManager, install: Install
    ) -> None:
        install(
            "good",
            GOOD + "\n    from fastft_plugins.manager import get_plugin_manager\n    get_plugin_manager().hook\n",
        )
        assert features(plugin_manager).count("a feature of good") == 1

    def test_third_parties_are_asked_before_our_own(self, plugin_manager: PluginManager, install: Install) -> None:
        install("good")
        assert plugin_manager.hook.fastft_features()[0] == ["a feature of good"]

    def test_an_interrupt_is_not_a_broken_plugin(self, plugin_manager: PluginManager, install: Install) -> None:
        install("interrupted", "raise KeyboardInterrupt")
        with pytest.raises(KeyboardInterrupt):
            plugin_manager.statuses  # noqa: B018


class TestOwnAdapters:
    @pytest.fixture(autouse=True)
    def stand_ins(self, monkeypatch: pytest.MonkeyPatch) -> None:
        adapters = {"fastft_first": "first", "fastft_second": "second", "fastft_absent": "absent"}
        monkeypatch.setattr(manager_module, "OWN_ADAPTERS", adapters)

    def write_package(self, folder: Path, package: str) -> None:
        (folder / package).mkdir(exist_ok=True)
        (folder / package / "__init__.py").touch()
        (folder / package / "plugin.py").write_text(textwrap.dedent(GOOD).replace("{name}", package))

    def test_found_in_a_source_tree(self, plugin_manager: PluginManager, install: Install, tmp_path: Path) -> None:
        self.write_package(tmp_path, "fastft_first")
        install("a_third_party")
        assert status_of(plugin_manager, "first").source == "source tree"
        assert "a feature of fastft_first" in features(plugin_manager)

    def test_installed_and_in_the_path_is_loaded_once(
        self, plugin_manager: PluginManager, install: Install, tmp_path: Path
    ) -> None:
        self.write_package(tmp_path, "fastft_first")
        self.write_package(tmp_path, "fastft_second")
        install("first", module="fastft_first.plugin")
        install("a_third_party")
        # Where this project is installed, its real adapters are third parties to the two written here.
        statuses = [status for status in plugin_manager.statuses if status.source != "fastft-plugins"]
        assert [(status.name, status.source) for status in statuses] == [
            ("built-in", "built-in"),
            ("first", "first-distribution"),
            ("second", "source tree"),
            ("a_third_party", "a_third_party-distribution"),
        ]
        assert features(plugin_manager).count("a feature of first") == 1


class TestSelection:
    @pytest.mark.parametrize(
        "value, loaded",
        [
            ("", {"a", "b", "c"}),
            (" , ", {"a", "b", "c"}),
            ("a", {"a"}),
            ("a, c", {"a", "c"}),
            ("-a", {"b", "c"}),
            ("-a,-b", {"c"}),
            ("a,b,-b", {"a"}),
        ],
    )
    def test_by_environment_variable(
        self,
        value: str,
        loaded: set[str],
        plugin_manager: PluginManager,
        install: Install,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        for name in "abc":
            install(name)
        monkeypatch.setenv("FASTFT_PLUGINS", value)
        states = {status.name: status.state for status in plugin_manager.statuses}
        assert states.pop("built-in") == "loaded"
        assert {name: states[name] for name in "abc"} == {
            name: "loaded" if name in loaded else "disabled" for name in "abc"
        }
        assert {name for name in "abc" if f"{name}_module" in sys.modules} == loaded
        assert warnings_in(caplog) == []

    @pytest.mark.parametrize(
        "value, warning",
        [
            ("a,goood", "'goood', which is not installed; known: "),
            ("-goood", "'goood', which is not installed; known: "),
            ("-built-in", "'built-in', which is always on"),
        ],
    )
    def test_a_name_that_selects_nothing_is_warned_about(
        self,
        value: str,
        warning: str,
        plugin_manager: PluginManager,
        install: Install,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        install("a")
        monkeypatch.setenv("FASTFT_PLUGINS", value)
        assert plugin_manager.statuses[0] == status_of(plugin_manager, "built-in")
        assert status_of(plugin_manager, "a").state == "loaded"
        (message,) = warnings_in(caplog)
        assert warning in message

    def test_the_built_in_plugin_may_be_named(
        self, plugin_manager: PluginManager, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setenv("FASTFT_PLUGINS", "built-in")
        assert [status.name for status in plugin_manager.statuses if status.state == "loaded"] == ["built-in"]
        assert warnings_in(caplog) == []


@pytest.mark.usefixtures("only_built_in")
class TestRegistering:
    def test_register_and_unregister(self, plugin_manager: PluginManager) -> None:
        plugin = Plugin(lambda: "done")
        assert plugin_manager.register(plugin, "mine") == "mine"
        expected = PluginStatus("mine", "registered by code", hooks=("fastft_inject_metadata",))
        assert status_of(plugin_manager, "mine") == expected
        plugin_manager.unregister(plugin)
        assert "mine" not in [status.name for status in plugin_manager.statuses]
        assert plugin_manager.call_each("fastft_inject_metadata", run=None, wrap_collator=None) == []
        plugin_manager.register(plugin, "mine")
        plugin_manager.unregister("mine")

    def test_a_plugin_without_a_name_gets_one(self, plugin_manager: PluginManager) -> None:
        name = plugin_manager.register(sys.modules[__name__])
        assert name == __name__
        assert status_of(plugin_manager, name).state == "loaded"

    def test_twice_raises_and_keeps_the_first(self, plugin_manager: PluginManager) -> None:
        plugin = Plugin(lambda: "first")
        plugin_manager.register(plugin, "mine")
        for other, name in ((plugin, "another"), (Plugin(lambda: "second"), "mine"), (plugin, "mine")):
            with pytest.raises(ValueError, match="registered already"):
                plugin_manager.register(other, name)
        results = plugin_manager.call_each("fastft_inject_metadata", run=None, wrap_collator=None)
        assert results == [("mine", "first")]

    def test_a_plugin_that_does_not_fit_raises_and_leaves_nothing(self, plugin_manager: PluginManager) -> None:
        class Misfit(Plugin):
            @hookimpl
            def fastft_matches(self, wheel: Any) -> bool:
                return True

        before = plugin_manager.statuses
        with pytest.raises(pluggy.PluginValidationError, match="wheel"):
            plugin_manager.register(Misfit(lambda: "done"), "misfit")
        assert plugin_manager.statuses == before
        assert plugin_manager.call_each("fastft_inject_metadata", run=None, wrap_collator=None) == []

    def test_unregistering_a_stranger_names_the_registered(self, plugin_manager: PluginManager) -> None:
        with pytest.raises(ValueError, match="'stranger' is not a registered plugin; registered: built-in"):
            plugin_manager.unregister("stranger")


@pytest.mark.usefixtures("only_built_in")
class TestCallEach:
    def test_a_failure_hides_no_other_result(self, plugin_manager: PluginManager) -> None:
        failure, refusal = RuntimeError("no luck"), Declined("not here")

        def fail() -> None:
            raise failure

        def refuse() -> None:
            raise refusal

        for name, act in {"one": lambda: 1, "failing": fail, "silent": lambda: None, "refusing": refuse}.items():
            plugin_manager.register(Plugin(act), name)
        results = plugin_manager.call_each("fastft_inject_metadata", run=None, wrap_collator=None)
        assert results == [("refusing", refusal), ("failing", failure), ("one", 1)]

    def test_every_plugin_is_asked_even_where_the_first_answer_would_win(self, plugin_manager: PluginManager) -> None:
        class Matcher:
            def __init__(self, answer: Any) -> None:
                self.answer = answer

            @hookimpl
            def fastft_matches(self) -> Any:
                return self.answer

        plugin_manager.register(Matcher(True), "yes")
        plugin_manager.register(Matcher(["a", "list"]), "list")
        results = plugin_manager.call_each("fastft_matches", target=object())
        assert ("list", ["a", "list"]) in results and ("yes", True) in results

    def test_wrappers_of_other_plugins_stay_in_place(self, plugin_manager: PluginManager) -> None:
        class Wrapper:
            @hookimpl(wrapper=True)
            def fastft_inject_metadata(self) -> Any:
                results = yield
                return [f"wrapped {result}" for result in results]

        plugin_manager.register(Plugin(lambda: "one"), "one")
        plugin_manager.register(Plugin(lambda: "two"), "two")
        plugin_manager.register(Wrapper(), "wrapper")
        results = plugin_manager.call_each("fastft_inject_metadata", run=None, wrap_collator=None)
        assert results == [("two", "wrapped two"), ("one", "wrapped one")]

    def test_an_interrupt_goes_through(self, plugin_manager: PluginManager) -> None:
        def interrupt() -> None:
            raise KeyboardInterrupt

        plugin_manager.register(Plugin(interrupt), "interrupted")
        with pytest.raises(KeyboardInterrupt):
            plugin_manager.call_each("fastft_inject_metadata", run=None, wrap_collator=None)

    def test_an_unhashable_plugin_is_refused_when_registered(self, plugin_manager: PluginManager) -> None:
        class Unhashable(Plugin):
            __hash__ = None  # type: ignore[assignment]

        with pytest.raises(TypeError, match="unhashable"):
            plugin_manager.register(Unhashable(lambda: 1), "unhashable")


@pytest.mark.usefixtures("only_built_in")
class TestTracing:
    @pytest.fixture(autouse=True)
    def traced(self, monkeypatch: pytest.MonkeyPatch, plugin_manager: PluginManager) -> Iterator[None]:
        monkeypatch.setenv("FASTFT_TRACE", "1")
        yield
        logging.getLogger("fastft").setLevel(logging.NOTSET)

    def test_calls_are_logged_with_plugin_arguments_and_result(
        self, plugin_manager: PluginManager, caplog: pytest.LogCaptureFixture
    ) -> None:
        plugin_manager.register(Plugin(lambda: "collator wrapped"), "one")
        plugin_manager.register(Plugin(lambda: None), "two")
        plugin_manager.hook.fastft_inject_metadata(run=Plugin(print), wrap_collator=[1, "x" * 100, *range(9)])
        (line,) = [record.getMessage() for record in caplog.records if "fastft_inject_metadata" in record.getMessage()]
        assert line.startswith("fastft_inject_metadata(run=<Plugin>, wrap_collator=[1, 'xxx")
        assert line.endswith("0, 1, ...]) by two, one -> ['collator wrapped']")
        assert len(line) < 200

    def test_a_failing_call_is_logged_too(
        self, plugin_manager: PluginManager, caplog: pytest.LogCaptureFixture
    ) -> None:
        def fail() -> None:
            raise RuntimeError("no luck")

        plugin_manager.register(Plugin(fail), "failing")
        plugin_manager.call_each("fastft_inject_metadata", run=None, wrap_collator=print)
        assert "(run=None, wrap_collator=print) by failing -> raised RuntimeError: no luck" in caplog.text

    @pytest.mark.parametrize(
        "trace, configure, lines", [("1", False, 1), ("1", True, 1), ("0", False, 0), ("", True, 0)]
    )
    def test_shown_on_stderr_exactly_once(self, trace: str, configure: bool, lines: int) -> None:
        code = "from fastft_plugins.manager import get_plugin_manager; get_plugin_manager().hook.fastft_kernels(op='x')"
        if configure:
            code = f"import logging; logging.basicConfig(level=logging.WARNING); {code}"
        path = ":".join(sys.path)
        environment = {"PYTHONPATH": path, "FASTFT_TRACE": trace, "FASTFT_PLUGINS": "built-in"}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert done.stderr.count("fastft_kernels(op='x') by built-in -> ") == lines
        assert done.stdout == ""

    def test_a_message_that_names_us_already_gets_no_second_prefix(self) -> None:
        code = (
            "from fastft_plugins.manager import get_plugin_manager, logger; get_plugin_manager().hook\n"
            "logger.warning('fastft: one'); logger.warning('two')"
        )
        environment = {"PYTHONPATH": ":".join(sys.path), "FASTFT_TRACE": "1", "FASTFT_PLUGINS": "built-in"}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert done.stderr.splitlines()[-2:] == ["fastft: one", "fastft: two"]


def test_one_manager_for_the_process(plugin_manager: PluginManager) -> None:
    assert get_plugin_manager() is plugin_manager is get_plugin_manager()
