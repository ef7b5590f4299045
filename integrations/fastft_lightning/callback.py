"""The callback that starts a run when a Lightning Trainer begins to fit, and ends it whatever happens."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fastft_lightning import namespaces
from fastft_lightning.traps import warn_about_traps
from fastft_plugins import auto
from fastft_plugins.config import FastFTConfig
from fastft_plugins.metrics import Window
from fastft_plugins.report import Report
from fastft_plugins.run import Run, Target, active_run

logger = logging.getLogger("fastft")

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import Callback
else:  # Lightning takes a callback of its other namespace as well
    Callback = namespaces.loaded()[0].callbacks.Callback


class FastFTLightningCallback(Callback):
    """``Trainer(callbacks=[FastFTLightningCallback()])`` or ``Fabric(callbacks=[...])``.

    Under Fabric the run begins when ``fabric.setup`` returns and ends with `close`; the batches are those that your
    loader makes, so wrap its collator with `fastft_plugins.packing.PaddingFreeCollator`.

    Args:
        config: a `FastFTConfig`, or a dict of its fields.

    Attributes:
        report: what was on in the last training, why, and what it saved.
        speaks_for_run: whether it shows and saves its report at the end of each training, for ``fastft run``.

    Raises:
        FastFTConfigError: at once, for a bad config.
        FastFTError: before the first step, if a feature set to "on" cannot be on.
    """

    def __init__(self, config: FastFTConfig | Mapping[str, Any] | None = None) -> None:
        self.config = FastFTConfig.coerce(config)
        self.report = Report()
        self.speaks_for_run = False
        self._run: Run | None = None
        self._window: Window | None = None
        self._block: Run | None = None  # the `apply(trainer)` block this callback was made for

    @classmethod
    def for_block(cls, block: Run) -> FastFTLightningCallback:
        """The callback of an ``apply(trainer)`` block, whose report it keeps up to date."""
        callback = cls(block.config)
        callback._block = block
        return callback

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Start the run: the model is on its device, and no dataloader has been made yet."""
        self.close()
        if self._start(Target(pl_module, trainer, "lightning")):
            self._call_me_first(trainer)
            warn_about_traps(self.report, pl_module)
            self._log(trainer)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        if self._run is not None:
            self.close()
            self._log(trainer)
            if self.speaks_for_run and trainer.is_global_zero:
                auto.announce(self.report)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Send our numbers to the Trainer's loggers on the steps whose own metrics it sends."""
        if self._window is not None and trainer.loggers and trainer._logger_connector.should_update_logs:
            step = trainer.fit_loop.epoch_loop._batches_that_stepped
            if not trainer.fit_loop._should_accumulate():
                measured = self._window.close(step)
                for logger in trainer.loggers if measured else ():
                    logger.log_metrics(measured, step=step)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.close(exception)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.close()

    def on_after_setup(self, fabric: Any, module: Any) -> None:
        """Fabric's event after ``fabric.setup(model, ...)``."""
        self.close()
        self._start(Target(module, None, "fabric"))

    def close(self, error: BaseException | None = None) -> None:
        """End the run and restore everything; may be called at any time, and twice."""
        if self._run is not None:
            self._run.stop(error)
            self._run = self._window = None

    def __getstate__(self) -> dict[str, Any]:
        """ddp_spawn pickles the callback before the run; a run never leaves its process."""
        return vars(self) | {"_run": None, "_block": None, "_window": None}

    def _start(self, target: Target) -> bool:
        """Start a run of our own, unless one is active already: a second callback, or an `apply` block."""
        outer = active_run(target.model)
        run = outer or Run(target, self.config)
        self.report = run.report
        if self._block is not None:
            self._block.report = run.report
        if outer is not None:
            outer.join(self.config)
            return False
        self._run = run
        run.start()
        self._window = Window(run)
        return True

    def _call_me_first(self, trainer: Any) -> None:
        """Another callback's on_exception may raise; then Lightning calls neither the ones after it nor teardown."""
        index = trainer.callbacks.index(self)

        def move(to: int) -> None:
            # A new list each time: Lightning may be iterating over the old one.
            others = [callback for callback in trainer.callbacks if callback is not self]
            trainer.callbacks = [*others[:to], self, *others[to:]]

        assert self._run is not None
        move(0)
        self._run.ledger.record("the order of the callbacks", lambda: move(index))

    def _log(self, trainer: Any) -> None:
        if trainer.is_global_zero:
            logger.info("%s", self.report)
