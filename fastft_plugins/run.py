"""One training run: asks the features to decide, the adapters to inject, owns the ledger, and puts everything back."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from torch import nn

from fastft_plugins.config import FEATURES, FastFTConfig
from fastft_plugins.device import share_of_processes
from fastft_plugins.errors import Declined, FastFTError, NoAdapter, NothingToWin
from fastft_plugins.ledger import Ledger
from fastft_plugins.manager import get_plugin_manager
from fastft_plugins.report import FeatureReport, Report

logger = logging.getLogger("fastft")

# The run that is active on a model, by the model's id. Weak: a run lives as long as whoever started it.
_active: weakref.WeakValueDictionary[int, Run] = weakref.WeakValueDictionary()


@dataclass(frozen=True)
class Target:
    """What is to be trained: the model, the trainer if there is one, and the name of its framework."""

    model: nn.Module
    trainer: Any = None
    framework: str = "torch"
    train_dataloader: Any = None  # the one about to be iterated, where the trainer has made it
    in_training: bool = False  # the trainer has begun: it has made its model and switched checkpointing on
    # For a trainer that gets its model only when it trains: called with the run in place of the features, and sees to
    # it that a run on that model starts then. ``model`` is a stand-in.
    hand_over: Callable[[Run], None] | None = None


class Feature(Protocol):
    """One optimisation. ``name`` is a field of `FastFTConfig`; a plugin's own feature has no field, and is "auto".

    A feature may also have ``stay_off(run)``, called where it is switched off or declined, once all have decided; and
    ``measure(run)``, numbers by name for the trainer's own logs, called at steps that log, so that it may wait for the
    device.
    """

    name: str

    def start(self, run: Run) -> str:
        """Switch on for ``run`` and return the reason in a few words, or raise `Declined` with the reason."""

    def stop(self, run: Run) -> None:
        """Training has ended or failed: add the last figures to the report. The ledger undoes the changes."""


class Run:
    """The state of one training run. `start` and `stop` are idempotent; `stop` also runs when the run is collected."""

    def __init__(
        self, target: Target, config: FastFTConfig | Mapping[str, Any] | None = None, *, is_orphan: bool = False
    ) -> None:
        self.target = target
        self.is_orphan = is_orphan  # its trainer cannot be found, so nothing ends it when training fails
        self.config = FastFTConfig.coerce(config)
        self.report = Report(framework=target.framework, model=type(target.model).__name__)
        self.ledger = Ledger()
        self.wrap_collator: Callable[..., Any] | None = None  # set by the packing feature, refined by adapters
        self.has_given_collator = False
        self.token_budget: int | None = None  # set by an adapter whose batches hold max_tokens_per_batch
        self._features: list[Feature] = []
        weakref.finalize(self, self.ledger.close).atexit = False

    @property
    def model(self) -> nn.Module:
        return self.target.model

    @property
    def active(self) -> bool:
        return _active.get(id(self.model)) is self

    def serves(self, trainer: Any) -> bool:
        """Whether training that starts now with ``trainer``, or in a loop if None, is this run's own or inside it.

        A run of one trainer is over when another one starts, and so is an orphan: a failure has kept it from ending.
        """
        mine = self.target.trainer
        return not self.is_orphan and (mine is None or trainer is None or trainer is mine)

    def join(self, config: FastFTConfig) -> None:
        """Called instead of starting a run with ``config`` on the same model: say so if that is another one.

        Raises:
            FastFTError: ``config`` asks under ``packing="on"`` or ``strict=True`` for a token budget this run has not.
        """
        budget = config.max_tokens_per_batch
        if budget not in (None, self.token_budget) and (config.strict or config.packing == "on"):
            raise FastFTError(
                f"max_tokens_per_batch={budget} has no effect: the run that is active on this model keeps "
                f"{self.config}; give the setting to that one, apply(trainer, config), or do without that one"
            )
        note = f"a second config, {config}, joined this run and is not used; the run keeps {self.config}"
        if config not in (self.config, FastFTConfig()) and note not in self.report.notes:
            self.report.notes.append(note)
            logger.warning("fastft: %s", note)

    def collator(self, inner: Any) -> Any:
        """The collator for the loader of your own loop: ``inner``, made padding-free if this run packs its batches.

        Use the loader inside the run only. After its end the collator returns the batches of ``inner``, except in
        workers of a loader that were started before.
        """
        if self.wrap_collator is None or not self.report.features["packing"].enabled:
            return inner
        self.has_given_collator = True
        collator = self.wrap_collator(inner)
        self.ledger.record("a collator of Run.collator", partial(_retire, weakref.ref(collator)))
        return collator

    def start(self) -> Run:
        """Ask every feature; whatever one of them raises, nothing stays behind."""
        if self.active:
            return self
        if active_run(self.model) is not None:
            raise FastFTError(f"a fastft run is already active on this {type(self.model).__name__}; stop it first")
        _active[id(self.model)] = self
        self.report.state = "running"
        if (share := share_of_processes()) is not None:
            self.report.notes.append(f"the figures are those of {share}")
        try:
            if self.target.hand_over is not None:
                self.target.hand_over(self)
            else:
                self._start_features()
        except BaseException as error:
            self.stop(error)
            raise
        return self

    def stop(self, error: BaseException | None = None) -> None:
        """Undo every change and close the report."""
        if not self.active:
            return
        self.report.state = "finished" if error is None else f"stopped by {type(error).__name__}"
        for feature in self._features:
            try:
                feature.stop(self)
            except Exception as problem:  # only the report suffers; everything must still be restored
                self.report.notes.append(f"{feature.name} failed to finish its report: {problem}")
        self._features.clear()
        try:
            self.ledger.close()
        finally:  # an interrupt during the undo comes out of it, after everything is restored
            self.report.notes.extend(self.ledger.notes)
            _active.pop(id(self.model), None)

    def measure(self) -> dict[str, float]:
        """What the features that are on have to say for the trainer's own logs."""
        measured: dict[str, float] = {}
        for feature in self._features:
            if hasattr(feature, "measure"):
                measured |= feature.measure(self)
        return measured

    def call(self, hook: str, **arguments: Any) -> list[str]:
        """Call a seam on every plugin; returns what they changed.

        Raises:
            Declined: with the reason, if a plugin declined or failed.
            NoAdapter: none of them had anything to change.
        """
        changes = []
        for plugin, result in get_plugin_manager().call_each(hook, run=self, **arguments):
            if isinstance(result, FastFTError):
                raise result
            if isinstance(result, Exception):
                raise Declined(f"plugin '{plugin}' failed: {type(result).__name__}: {result}") from result
            if result is not None:
                changes.append(str(result))
        if not changes:
            left_out = [status.name for status in get_plugin_manager().statuses if status.state == "disabled"]
            raise NoAdapter(
                f"no plugin knows how to serve this {self.report.framework} target ({self.report.model})"
                + (f"; FASTFT_PLUGINS leaves out: {', '.join(left_out)}" if left_out else "")
            )
        return changes

    def switch_off(self, name: str, declined: Declined) -> None:
        """A feature that was on turns out not to be possible: report it, warn, and raise if it was asked for."""
        entry = self.report.features[name]
        entry.enabled, entry.reason = False, str(declined)
        self._refuse(name, declined)

    def fall_short(
        self, name: str, declined: Declined, warning: str = "is not on everywhere, training is stock where not"
    ) -> None:
        """A feature that stays on cannot serve all of the training: warn, and raise if it was asked for."""
        self._refuse(name, declined, "has to leave something out", warning)

    def _start_features(self) -> None:
        offered: dict[str, Feature] = {}
        for plugin, result in get_plugin_manager().call_each("fastft_features"):
            if isinstance(result, Exception):
                self.report.notes.append(f"plugin '{plugin}' failed to offer features: {result}")
            else:
                offered.update({feature.name: feature for feature in result})
        for name in dict.fromkeys((*FEATURES, *offered)):
            self._start_feature(name, offered.get(name))
        for name, feature in offered.items():
            if not self.report.features[name].enabled and hasattr(feature, "stay_off"):
                feature.stay_off(self)

    def _start_feature(self, name: str, feature: Feature | None) -> None:
        entry, mode = self.report.features.setdefault(name, FeatureReport(name)), self._mode(name)
        if mode == "off":
            entry.reason = "switched off in the config"
            return
        try:
            if feature is None:
                raise Declined("not part of this version")
            with self.ledger.all_or_nothing():
                try:
                    entry.reason = feature.start(self)
                except FastFTError:
                    raise
                except Exception as problem:
                    raise Declined(f"failed to start: {type(problem).__name__}: {problem}") from problem
        except Declined as declined:
            entry.reason = str(declined)
            if feature is not None or mode == "on":
                self._refuse(name, declined)
            return
        entry.enabled = True
        self._features.append(feature)

    def _mode(self, name: str) -> str:
        return self.config.mode(name) if name in FEATURES else "auto"  # a plugin's own feature has no setting

    def _refuse(
        self,
        name: str,
        declined: Declined,
        error: str = "cannot be on here",
        warning: str = "stays off, training is stock there",
    ) -> None:
        if isinstance(declined, NothingToWin) and self._mode(name) != "on":
            logger.debug("fastft: %s stays off: %s", name, declined)
            return
        if self._mode(name) == "on" or self.config.strict:
            on = self._mode(name) == "on"
            asked, remedy = (f"{name}='on'", f"{name}='auto'") if on else ("strict=True", "strict=False")
            raise FastFTError(
                f"{asked}, but {name} {error}: {declined}. Remedy: {remedy}, which trains stock there"
            ) from declined
        logger.warning("fastft: %s %s: %s", name, warning, declined)


def _retire(collator_ref: weakref.ref[Any]) -> None:
    collator = collator_ref()
    if collator is not None:
        collator.packs = False


def active_run(model: nn.Module) -> Run | None:
    """The run that is active on ``model``, if any."""
    return _active.get(id(model))


def joinable_run(model: nn.Module, trainer: Any) -> Run | None:
    """The active run that training with ``trainer``, or in a loop if None, belongs to; stops one it does not.

    Raises:
        FastFTError: the run to stop is in the middle of a training with ``packing="on"`` or ``strict=True``, whose
            batches are too large to go on padded.
    """
    outer = active_run(model)
    if outer is None or outer.serves(trainer):
        return outer
    budget = outer.token_budget
    if budget is not None and outer.target.in_training and (outer.config.strict or outer.config.packing == "on"):
        raise FastFTError(
            "another Trainer begins to train this model in the middle of a training with "
            f"max_tokens_per_batch={budget}, whose batches would go on padded, and larger: train a copy of the model, "
            "or leave out strict=True and packing='on'"
        )
    if not outer.is_orphan:
        note = "another Trainer began to train this model, which ended this run; training went on as stock"
        if budget is not None:  # a train dataloader stays the one that was made for the training
            note += f", what was left of it in padded batches, formed by up to {budget:,} real tokens"
        outer.report.notes.append(note)
        logger.warning("fastft: %s", note)
    outer.stop()
    return None


__all__: Sequence[str] = ("Feature", "Run", "Target", "active_run", "joinable_run")
