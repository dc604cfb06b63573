"""Stop requests: immediate, deferred and swallowed."""

import contextlib

import pytest

from topwork.cancellation import StopInterrupt, StopRequest
from topwork.errors import Stopped


def test_stop_request_interrupts_immediately():
    stop = StopRequest()
    with pytest.raises(StopInterrupt):
        stop.set()
    assert stop.is_set()


def test_stop_request_is_not_swallowed_by_code_that_catches_every_exception():
    with pytest.raises(StopInterrupt), contextlib.suppress(Exception):
        StopRequest().set()


def test_deferred_stop_request_is_visible_and_raises_at_the_end_of_the_block():
    stop = StopRequest()
    seen = False
    with pytest.raises(Stopped, match="Start the same job again to resume"), stop.deferred():
        stop.set()
        seen = stop.is_set()
    assert seen


def test_stop_request_after_a_deferred_block_interrupts_immediately():
    stop = StopRequest()
    with stop.deferred():
        pass
    with pytest.raises(StopInterrupt):
        stop.set()
