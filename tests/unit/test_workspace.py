"""The wish to stop."""

import pytest

from topwork.errors import Stopped
from topwork.workspace import StopSignal


def test_a_wish_to_stop_is_granted_at_once():
    stop = StopSignal()
    with pytest.raises(Stopped, match="Start the same job again to go on"):
        stop.ask()
    assert stop.is_set()


def test_training_holds_the_wish_off_and_sees_it():
    stop = StopSignal()
    reached = False
    with pytest.raises(Stopped), stop.held():
        stop.ask()
        reached = stop.is_set()
    assert reached


def test_a_wish_after_training_is_granted_at_once_again():
    stop = StopSignal()
    with stop.held():
        pass
    with pytest.raises(Stopped):
        stop.ask()
