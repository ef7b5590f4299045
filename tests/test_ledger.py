"""The ledger puts back what was there, in reverse order, whatever happens in between."""

from __future__ import annotations

import gc
import logging
import threading
import weakref

import pytest

from fastft_plugins.ledger import Ledger


class Trainer:
    """Somebody else's object."""

    collator = "of the class"

    def step(self) -> str:
        return "stock"


def fast_step() -> str:
    return "fast"


def slow_step() -> str:
    return "slow"


def other_step() -> str:
    return "other"


@pytest.fixture
def ledger() -> Ledger:
    return Ledger()


def fail() -> None:
    raise RuntimeError("no luck")


def test_changes_are_undone_last_first(ledger):
    undone = []
    for name in "abc":
        ledger.record(name, lambda name=name: undone.append(name))
    ledger.close()
    assert undone == ["c", "b", "a"]


def test_its_length_is_the_number_of_changes_to_undo(ledger):
    ledger.record("a", lambda: None)
    ledger.record("b", lambda: None)
    assert len(ledger) == 2
    ledger.close()
    assert len(ledger) == 0


def test_closing_twice_undoes_once(ledger):
    undone = []
    ledger.record("a", lambda: undone.append("a"))
    ledger.close()
    ledger.close()
    assert undone == ["a"]


def test_an_attribute_of_the_instance_gets_its_value_back(ledger):
    trainer = Trainer()
    trainer.step = slow_step
    ledger.setattr(trainer, "step", fast_step)
    assert trainer.step() == "fast"
    ledger.close()
    assert vars(trainer) == {"step": slow_step}


def test_an_attribute_of_the_class_comes_through_again(ledger):
    trainer = Trainer()
    ledger.setattr(trainer, "step", fast_step)
    assert trainer.step() == "fast"
    ledger.close()
    assert vars(trainer) == {} and trainer.step() == "stock"


def test_a_value_of_none_comes_back(ledger):
    trainer = Trainer()
    trainer.step = None
    ledger.setattr(trainer, "step", fast_step)
    ledger.close()
    assert vars(trainer) == {"step": None}


def test_one_attribute_changed_twice_goes_back_to_the_first_value(ledger):
    trainer = Trainer()
    ledger.setattr(trainer, "step", slow_step)
    ledger.setattr(trainer, "step", fast_step)
    ledger.close()
    assert vars(trainer) == {} and ledger.notes == []


@pytest.mark.parametrize("theirs", [other_step, None, "text"])
def test_what_someone_else_changed_is_left_and_noted(ledger, theirs):
    trainer = Trainer()
    ledger.setattr(trainer, "step", lambda: "ours")
    trainer.step = theirs
    ledger.close()
    assert vars(trainer) == {"step": theirs}
    assert ledger.notes == ["Trainer.step was changed by someone else during the run and is left as it is"]


def test_what_someone_else_deleted_stays_deleted_and_is_noted(ledger):
    trainer = Trainer()
    trainer.step = slow_step
    ledger.setattr(trainer, "step", fast_step)
    del trainer.step
    ledger.close()
    assert vars(trainer) == {} and len(ledger.notes) == 1


def test_an_undo_that_fails_does_not_stop_the_others(ledger, caplog):
    undone = []
    ledger.record("first", lambda: undone.append("first"))
    ledger.record("the hook", fail)
    ledger.record("last", lambda: undone.append("last"))
    with caplog.at_level(logging.ERROR, logger="fastft"):
        ledger.close()
    assert undone == ["last", "first"]
    assert ledger.notes == ["the hook could not be restored: no luck"]
    assert "the hook could not be restored" in caplog.text


def test_an_interrupted_close_can_be_completed(ledger):
    undone = []

    def interrupt() -> None:
        raise KeyboardInterrupt

    ledger.record("first", lambda: undone.append("first"))
    ledger.record("second", interrupt)
    with pytest.raises(KeyboardInterrupt):
        ledger.close()
    ledger.close()
    assert undone == ["first"]


def test_a_failed_block_takes_back_its_own_changes_only(ledger):
    undone = []
    ledger.record("before", lambda: undone.append("before"))
    with pytest.raises(RuntimeError), ledger.all_or_nothing():
        ledger.record("one", lambda: undone.append("one"))
        ledger.record("two", lambda: undone.append("two"))
        fail()
    assert undone == ["two", "one"] and len(ledger) == 1


def test_an_interrupted_block_takes_back_its_changes(ledger):
    trainer = Trainer()
    with pytest.raises(KeyboardInterrupt), ledger.all_or_nothing():
        ledger.setattr(trainer, "step", fast_step)
        raise KeyboardInterrupt
    assert vars(trainer) == {}


def test_a_block_that_succeeds_keeps_its_changes_until_the_end(ledger):
    trainer = Trainer()
    with ledger.all_or_nothing():
        ledger.setattr(trainer, "step", fast_step)
    assert trainer.step() == "fast"
    ledger.close()
    assert vars(trainer) == {}


def test_a_setattr_that_is_refused_records_nothing(ledger):
    class Frozen(Trainer):
        def __setattr__(self, name, value):
            raise AttributeError("frozen")

    with pytest.raises(AttributeError, match="frozen"):
        ledger.setattr(Frozen(), "step", fast_step)
    assert len(ledger) == 0


@pytest.mark.parametrize("first_ends_first", [True, False])
def test_a_shared_change_is_made_once_and_removed_by_the_last_run(first_ends_first):
    events, one, two = [], Ledger(), Ledger()
    for ledger in (one, two):
        ledger.share("shared thing", lambda: events.append("install"), lambda: events.append("remove"))
    assert events == ["install"]
    ends_first, ends_last = (one, two) if first_ends_first else (two, one)
    ends_first.close()
    assert events == ["install"]
    ends_last.close()
    assert events == ["install", "remove"]


def test_a_shared_change_can_be_made_again_after_its_removal():
    events = []
    for _ in range(2):
        ledger = Ledger()
        ledger.share("made again", lambda: events.append("install"), lambda: events.append("remove"))
        ledger.close()
    assert events == ["install", "remove"] * 2


def test_shared_changes_of_different_keys_are_counted_apart():
    events, ledger = [], Ledger()
    for key in ("left", "right"):
        ledger.share(key, lambda key=key: events.append(key), lambda: None)
    ledger.close()
    assert events == ["left", "right"]


def test_a_shared_change_that_fails_to_install_is_not_counted(ledger):
    events = []
    with pytest.raises(RuntimeError):
        ledger.share("fails once", fail, lambda: events.append("remove"))
    ledger.share("fails once", lambda: events.append("install"), lambda: events.append("remove"))
    ledger.close()
    assert events == ["install", "remove"]


def test_a_run_may_be_collected_while_another_installs():
    """The garbage collector runs anywhere, also where a shared change is being made."""
    events, old, new, runs = [], Ledger(), Ledger(), [Trainer()]
    old.share("of the old run", lambda: None, lambda: events.append("remove the old run's"))
    weakref.finalize(runs[0], old.close)  # as a `Run` has it
    arguments = ("of the new run", runs.clear, lambda: events.append("remove the new run's"))
    thread = threading.Thread(target=new.share, args=arguments, daemon=True)  # a deadlock must not hang the tests
    thread.start()
    thread.join(10)
    assert not thread.is_alive() and events == ["remove the old run's"]
    new.close()
    assert events == ["remove the old run's", "remove the new run's"]


def test_the_owner_is_not_kept_alive(ledger):
    trainer = Trainer()
    alive = weakref.ref(trainer)
    ledger.setattr(trainer, "step", fast_step)
    del trainer
    gc.collect()
    assert alive() is None
    ledger.close()
    assert ledger.notes == []


def test_the_value_is_not_kept_alive_by_the_ledger(ledger):
    trainer, value = Trainer(), Trainer()
    alive = weakref.ref(value)
    ledger.setattr(trainer, "step", value)
    trainer.step = other_step
    del value
    gc.collect()
    assert alive() is None


def test_an_interrupt_while_restoring_waits_until_everything_is_restored():
    ledger, undone = Ledger(), []

    def interrupted():
        raise KeyboardInterrupt

    ledger.record("first", lambda: undone.append("first"))
    ledger.record("worker shutdown", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ledger.close()
    assert undone == ["first"] and len(ledger) == 0
