"""The wish to stop."""

import contextlib

import pytest

from topwork.cancellation import StopNow, StopSignal
from topwork.errors import Stopped


def test_a_wish_to_stop_is_granted_at_once():
    stop = StopSignal()
    with pytest.raises(StopNow):
        stop.ask()
    assert stop.is_set()


def test_a_library_that_catches_every_exception_does_not_swallow_the_wish():
    with pytest.raises(StopNow), contextlib.suppress(Exception):
        StopSignal().ask()


def test_training_holds_the_wish_off_and_sees_it():
    stop = StopSignal()
    reached = False
    with pytest.raises(Stopped, match="Start the same job again to go on"), stop.held():
        stop.ask()
        reached = stop.is_set()
    assert reached


def test_a_wish_after_training_is_granted_at_once_again():
    stop = StopSignal()
    with stop.held():
        pass
    with pytest.raises(StopNow):
        stop.ask()
