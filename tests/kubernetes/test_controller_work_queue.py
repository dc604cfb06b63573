"""Work queue of the controller: delays, back-off, poisoned keys and concurrency."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from topwork.cluster.controller.runtime.work_queue import WorkQueue, WorkQueueSettings
from topwork.errors import UnavailableError

A, B = ("team-a", "a"), ("team-a", "b")
QUICK = WorkQueueSettings(workers=2, backoff_seconds=0.05, max_backoff_seconds=0.4, min_retry_seconds=0.02)


class Reconciler:
    """Records its calls, and does for each key what the test sets."""

    def __init__(self) -> None:
        self.calls: list[tuple[tuple[str, ...], float]] = []
        self.actions: dict[tuple[str, ...], Callable[[], float | None]] = {}

    def __call__(self, key):
        self.calls.append((key, time.monotonic()))
        return self.actions.get(key, lambda: None)()

    def times(self, key):
        return [at for called, at in list(self.calls) if called == key]


@pytest.fixture
def reconciler():
    return Reconciler()


@pytest.fixture
def make_queue(reconciler) -> Iterator[Callable[..., WorkQueue]]:
    queues = []

    def make(**changes):
        queue = WorkQueue(reconciler, WorkQueueSettings(**(vars(QUICK) | changes)))
        queues.append(queue)
        return queue

    yield make
    for queue in queues:
        queue.stop(5)


def until(condition, seconds=5.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def fail():
    raise UnavailableError("the API server is down")


def test_a_key_added_several_times_before_the_start_is_reconciled_once(make_queue, reconciler):
    queue = make_queue()
    for _ in range(100):
        queue.add(A)
    assert queue.depth == 1
    queue.start()
    until(lambda: queue.depth == 0 and len(reconciler.calls) == 1)
    time.sleep(0.1)
    assert len(reconciler.calls) == 1


def test_a_change_during_reconciliation_is_reconciled_afterwards_and_never_at_the_same_time(make_queue, reconciler):
    running, overlaps, release = [0], [], threading.Event()

    def work():
        running[0] += 1
        overlaps.append(running[0])
        release.wait(5)
        running[0] -= 1

    reconciler.actions[A] = work
    queue = make_queue(workers=4)
    queue.start()
    queue.add(A)
    until(lambda: reconciler.calls)
    for _ in range(10):
        queue.add(A)
    time.sleep(0.05)
    release.set()
    until(lambda: len(reconciler.calls) == 2)
    time.sleep(0.1)
    assert (overlaps, len(reconciler.calls)) == ([1, 1], 2)


def test_the_returned_delay_is_kept_and_a_change_shortens_it(make_queue, reconciler):
    delays = iter([0.2, 30.0, None])
    reconciler.actions[A] = lambda: next(delays)
    queue = make_queue()
    queue.start()
    queue.add(A)
    until(lambda: len(reconciler.calls) == 2)
    first, second = reconciler.times(A)
    assert 0.2 <= second - first < 1.0
    queue.add(A)
    until(lambda: len(reconciler.calls) == 3, seconds=1)


def test_a_failing_key_backs_off_exponentially_up_to_the_limit(make_queue, reconciler):
    reconciler.actions[A] = fail
    queue = make_queue()
    queue.start()
    queue.add(A)
    until(lambda: len(reconciler.calls) == 7)
    times = reconciler.times(A)
    gaps = [after - before for before, after in pairwise(times)]
    # 0.05, 0.1, 0.2, 0.4, 0.4, 0.4, each with a jitter of a quarter.
    assert all(0.75 * 0.05 * 2**n <= gap for n, gap in enumerate(gaps[:4]))
    assert all(gap < 0.4 * 1.25 + 0.3 for gap in gaps)


def test_success_resets_the_back_off(make_queue, reconciler):
    actions = iter([fail, fail, fail, fail, lambda: None, fail, lambda: None])
    reconciler.actions[A] = lambda: next(actions)()  # noqa: PLW0108 - the next one at each call
    queue = make_queue()
    queue.start()
    queue.add(A)
    until(lambda: len(reconciler.calls) == 5)
    queue.add(A)
    until(lambda: len(reconciler.calls) == 7)
    *_, before, after = reconciler.times(A)
    assert after - before < 0.35  # 0.05 s instead of 0.4 s


def test_changes_do_not_turn_a_failing_key_into_a_busy_loop(make_queue, reconciler):
    queue = make_queue(min_retry_seconds=0.1)

    def change_and_fail():
        queue.add(A)  # such as an event of the status that was written before the failure
        fail()

    reconciler.actions[A] = change_and_fail
    queue.start()
    queue.add(A)
    time.sleep(0.55)
    assert 3 <= len(reconciler.calls) <= 7


def test_frequent_changes_do_not_retry_a_failed_key_at_once(make_queue, reconciler):
    reconciler.actions[A] = fail
    queue = make_queue(min_retry_seconds=0.1, backoff_seconds=60.0, max_backoff_seconds=60.0)
    queue.start()
    deadline = time.monotonic() + 0.55
    while time.monotonic() < deadline:
        queue.add(A)
        time.sleep(0.005)
    assert 3 <= len(reconciler.calls) <= 7


@pytest.mark.parametrize("poison", [fail, lambda: 1 / 0, lambda: threading.Event().wait(3)])
def test_a_poisoned_key_never_blocks_others(make_queue, reconciler, poison):
    reconciler.actions[A] = poison
    queue = make_queue(workers=2)
    queue.start()
    queue.add(A)
    until(lambda: reconciler.calls)
    others = [("team-a", f"job-{number}") for number in range(200)]
    for key in others:
        queue.add(A)
        queue.add(key)
    until(lambda: {key for key, _ in list(reconciler.calls)} >= set(others), seconds=2)


def test_stop_waits_for_reconciliations_in_progress_and_starts_no_others(make_queue, reconciler):
    finished = []
    reconciler.actions[A] = lambda: (time.sleep(0.2), finished.append(A))[1]
    queue = make_queue(workers=1)
    queue.start()
    queue.add(A)
    until(lambda: reconciler.calls)
    queue.add(B)
    assert queue.stop(5)
    assert (finished, reconciler.times(B)) == ([A], [])


def test_stop_reports_a_reconciliation_that_does_not_end(make_queue, reconciler):
    release = threading.Event()
    reconciler.actions[A] = lambda: release.wait(10) and None
    queue = make_queue()
    queue.start()
    queue.add(A)
    until(lambda: reconciler.calls)
    assert not queue.stop(0.1)
    release.set()


def test_problem_names_the_key_of_a_stuck_worker(make_queue, reconciler):
    release = threading.Event()
    reconciler.actions[A] = lambda: release.wait(10) and None
    queue = make_queue()
    queue.start()
    assert queue.problem(0.1) is None
    queue.add(A)
    until(lambda: queue.problem(0.1))
    assert queue.problem(0.1).startswith("team-a/a has been reconciled for ")
    release.set()
    until(lambda: queue.problem(0.1) is None)


def test_age_of_the_oldest_key_counts_only_keys_that_are_due(make_queue, reconciler):
    queue = make_queue()
    assert (queue.depth, queue.oldest_seconds) == (0, 0.0)
    queue.add(A)
    time.sleep(0.1)
    queue.add(B)
    assert queue.depth == 2
    assert 0.1 <= queue.oldest_seconds < 1
    reconciler.actions[A] = reconciler.actions[B] = lambda: 30.0
    queue.start()
    until(lambda: len(reconciler.calls) == 2 and queue.depth == 0)
    assert queue.oldest_seconds == 0.0


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=60), st.integers(1, 4))
def test_each_key_is_reconciled_after_its_last_change(keys, workers):
    last_change, last_start, lock = Counter(), Counter(), threading.Lock()

    def reconcile(key):
        with lock:
            last_start[key] = last_change[key]

    queue = WorkQueue(reconcile, WorkQueueSettings(workers=workers))
    queue.start()
    for number in keys:
        with lock:
            last_change[("team-a", str(number))] += 1
        queue.add(("team-a", str(number)))
    until(lambda: last_start == last_change)
    assert queue.stop(5)
