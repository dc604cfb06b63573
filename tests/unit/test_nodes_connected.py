"""Connected nodes: collective operations, and failures of other nodes."""

import signal
import threading
import time

import numpy as np
import pytest
from structlog.testing import capture_logs
from tests.nodes.connections import TIMEOUT_SECONDS, NodeProcess, free_address, on_all, start_join, start_thread

from topwork.errors import DataError, Stopped, UnavailableError
from topwork.nodes import connected_nodes, connection
from topwork.nodes.frames import Kind, json_frame
from topwork.nodes.group import NodeGroup
from topwork.redaction import register_secrets

KILLED = (
    "Lost node 1: it closed the connection without a message, as a killed process does. The run resumes from its last "
    "checkpoint."
)


@pytest.fixture
def connect():
    """Connect nodes in threads, and disconnect them after the test."""
    groups: list[NodeGroup] = []

    def connect(count: int) -> list[NodeGroup]:
        coordinator = free_address()
        futures = [start_join(index, count, coordinator) for index in range(count)]
        groups.extend(future.result(TIMEOUT_SECONDS) for future in futures)
        return groups

    yield connect
    for group in groups:
        group.close()


def test_every_node_knows_the_facts_of_all(connect):
    groups = connect(3)
    assert [group.facts for group in groups] == [[{"thread": 0}, {"thread": 1}, {"thread": 2}]] * 3
    assert [(group.index, group.count, group.is_chief) for group in groups] == [
        (0, 3, True),
        (1, 3, False),
        (2, 3, False),
    ]


def test_gather_returns_all_values_on_all_nodes(connect):
    values = on_all(connect(3), lambda group: group.gather({"index": group.index, "text": "ä\n"}))
    assert values == [[{"index": index, "text": "ä\n"} for index in range(3)]] * 3


def test_broadcast_returns_the_value_of_the_chief_on_all_nodes(connect):
    assert on_all(connect(3), lambda group: group.broadcast(group.index or ("chief", 0.1))) == [["chief", 0.1]] * 3


def test_nan_passes_a_broadcast(connect):
    assert all(np.isnan(value) for value in on_all(connect(2), lambda group: group.broadcast(float("nan"))))


def test_any_and_all_agree_on_every_node(connect):
    groups = connect(3)
    assert on_all(groups, lambda group: group.any(group.index == 2)) == [True] * 3
    assert on_all(groups, lambda group: group.any(False)) == [False] * 3
    assert on_all(groups, lambda group: group.all(group.index < 2)) == [False] * 3
    assert on_all(groups, lambda group: group.all(True)) == [True] * 3


def test_broadcast_waits_for_the_last_node(connect):
    groups = connect(3)
    early = [start_thread(lambda group=group: group.broadcast("go")) for group in groups[:2]]
    time.sleep(0.3)
    assert [future.done() for future in early] == [False, False]
    assert groups[2].broadcast(None) == "go"
    assert [future.result(TIMEOUT_SECONDS) for future in early] == ["go", "go"]


@pytest.mark.parametrize("dtype", ["float32", "float16", "int64", "bool"])
def test_rows_are_concatenated_in_the_order_of_the_nodes(connect, dtype):
    rows = [np.arange(6 * (index + 1)).reshape(-1, 3).astype(dtype) for index in range(3)]
    results = on_all(connect(3), lambda group: group.concatenate_on_chief(rows[group.index]))
    np.testing.assert_array_equal(results[0], np.concatenate(rows), strict=True)
    assert results[1:] == [None, None]


def test_a_node_without_rows_adds_none(connect):
    results = on_all(connect(2), lambda group: group.concatenate_on_chief(np.ones((2 - 2 * group.index, 4))))
    np.testing.assert_array_equal(results[0], np.ones((2, 4)), strict=True)


def test_large_rows_arrive_complete(connect):
    rows = np.random.default_rng(0).random((3, 1_000_000), np.float32)
    result = on_all(connect(2), lambda group: group.concatenate_on_chief(rows + group.index))[0]
    np.testing.assert_array_equal(result, np.concatenate([rows, rows + 1]))


def test_rows_that_need_pickle_are_rejected(connect):
    with pytest.raises(TypeError, match="Rows of dtype object cannot be sent to another node"):
        connect(2)[1].concatenate_on_chief(np.array([{}], object))


def test_rows_of_different_kinds_are_a_bug(connect):
    groups = connect(2)
    future = start_thread(lambda: groups[0].concatenate_on_chief(np.ones((2, 4))))
    other = start_thread(lambda: groups[1].concatenate_on_chief(np.ones((2, 4), np.float32)))
    with pytest.raises(RuntimeError, match=r"rows of different kinds: float64 \(2, 4\), float32 \(2, 4\)"):
        future.result(TIMEOUT_SECONDS)
    groups[0].fail(RuntimeError("rows"))
    with pytest.raises(UnavailableError, match="Node 0 failed: RuntimeError: rows"):
        other.result(TIMEOUT_SECONDS)


def test_different_operations_are_a_bug(connect):
    groups = connect(2)
    start_thread(lambda: groups[1].gather(1))
    with pytest.raises(RuntimeError, match="Node 1 is at operation 'gather 1', node 0 at 'broadcast 1'"):
        groups[0].broadcast(1)


def test_different_values_are_a_bug_on_every_node(connect):
    def require(group: NodeGroup) -> str:
        group.require_equal("The hash", "same")
        with pytest.raises(RuntimeError) as raised:
            group.require_equal("The hash", f"hash {group.index}")
        return str(raised.value)

    message = "The hash differs between the nodes: ['hash 0', 'hash 1']. This is a bug in topwork."
    assert on_all(connect(2), require) == [message, message]


def test_a_value_without_json_type_is_rejected_before_it_is_sent(connect):
    with pytest.raises(TypeError, match="not JSON serializable"):
        connect(2)[1].gather({1, 2})


@pytest.mark.parametrize("failed", [0, 1, 2])
def test_the_error_of_a_node_reaches_all_others(connect, failed):
    groups = connect(3)
    register_secrets(["hunter2-secret"], "test")
    others = [group for group in groups if group.index != failed]
    futures = [start_thread(lambda group=group: group.gather(1)) for group in others]
    groups[failed].fail(DataError("No image in hunter2-secret."))
    for future in futures:
        with pytest.raises(UnavailableError, match=rf"^Node {failed} failed: No image in \*\*\*\.$"):
            future.result(TIMEOUT_SECONDS)


@pytest.mark.parametrize("stopped", [0, 1, 2])
def test_all_nodes_stop_with_a_stopped_one(connect, stopped):
    groups = connect(3)
    groups[stopped].fail(Stopped("Stopped."))
    for group in groups:
        if group.index != stopped:
            with pytest.raises(Stopped, match=f"Stopped because node {stopped} was stopped"):
                group.broadcast(1)


def test_a_stop_is_not_logged_as_a_failure(connect):
    groups = connect(2)
    with capture_logs() as events:
        groups[0].fail(Stopped("Stopped."))
        with pytest.raises(Stopped):
            groups[1].broadcast(1)
    assert events == [{"event": "node stopped", "peer": 0, "reason": "Stopped.", "log_level": "info"}]


def test_a_failure_is_logged_as_a_warning(connect):
    groups = connect(2)
    with capture_logs() as events:
        groups[0].fail(DataError("No image."))
        with pytest.raises(UnavailableError):
            groups[1].broadcast(1)
    # The field node of a line is the node that logs it.
    assert [(event["event"], event["peer"], event["log_level"]) for event in events] == [("node failed", 0, "warning")]


def test_a_bug_is_reported_with_its_type(connect):
    groups = connect(2)
    groups[0].fail(KeyError("x"))
    with pytest.raises(UnavailableError, match=r"^Node 0 failed: KeyError: 'x'$"):
        groups[1].broadcast(1)


def test_a_following_failure_does_not_hide_the_first(connect):
    groups = connect(3)
    groups[1].fail(DataError("first"))
    with pytest.raises(UnavailableError, match=r"^Node 1 failed: first$") as raised:
        groups[0].gather(1)
    groups[0].fail(raised.value)
    with pytest.raises(UnavailableError, match=r"^Node 1 failed: first$"):
        groups[2].gather(1)


def test_the_failure_of_a_node_is_known_outside_of_operations(connect):
    groups = connect(2)
    groups[1].fail(DataError("no images"))
    assert str(groups[0].peer_failure()) == "Node 1 failed: no images"


def test_there_is_no_failure_while_all_nodes_are_alive(connect, monkeypatch):
    monkeypatch.setattr(connected_nodes, "FAILURE_REPORT_SECONDS", 0.2)
    assert [group.peer_failure() for group in connect(2)] == [None, None]
    assert NodeGroup().peer_failure() is None


def test_a_node_that_left_in_good_order_has_not_failed(connect):
    groups = connect(2)
    called = threading.Event()
    groups[0].on_failure(lambda _: called.set())
    groups[1].close()
    with pytest.raises(UnavailableError, match="Node 1 has ended before gather 1"):
        groups[0].gather(1)
    assert groups[0].peer_failure() is None
    assert not called.is_set()


def test_the_callback_ends_a_process_whose_main_thread_is_blocked(connect, monkeypatch):
    monkeypatch.setattr(connected_nodes, "EXIT_SECONDS", 0.1)
    groups = connect(2)
    errors: list[str] = []
    called = threading.Event()
    groups[0].on_failure(lambda error: (errors.append(str(error)), called.set()))
    groups[1].fail(DataError("no images"))
    assert called.wait(TIMEOUT_SECONDS)
    assert errors == ["Node 1 failed: no images"]


def test_the_callback_is_called_for_an_earlier_failure(connect, monkeypatch):
    monkeypatch.setattr(connected_nodes, "EXIT_SECONDS", 0.1)
    groups = connect(2)
    groups[1].fail(DataError("no images"))
    assert groups[0].peer_failure()
    called = threading.Event()
    groups[0].on_failure(lambda _: called.set())
    assert called.wait(TIMEOUT_SECONDS)


@pytest.mark.parametrize("leave", [lambda group: group.close(), lambda group: group.fail(UnavailableError("x"))])
def test_the_callback_is_not_called_after_leaving(connect, monkeypatch, leave):
    monkeypatch.setattr(connected_nodes, "EXIT_SECONDS", 0.5)
    groups = connect(2)
    called = threading.Event()
    groups[0].on_failure(lambda _: called.set())
    groups[1].fail(DataError("no images"))
    assert groups[0].peer_failure()
    leave(groups[0])
    assert not called.wait(1.0)


def test_operations_after_leaving_are_a_bug(connect):
    groups = connect(2)
    groups[0].close()
    with pytest.raises(RuntimeError, match="came after close"):
        groups[0].gather(1)


def test_leaving_twice_is_harmless(connect):
    groups = connect(2)
    on_all(groups, lambda group: (group.gather(1), group.close(), group.close(), group.fail(DataError("late"))))


def test_a_single_node_fails_and_leaves_without_effect():
    group = NodeGroup()
    group.on_failure(lambda _: pytest.fail("called"))
    group.fail(DataError("x"))
    group.close()


# ── Processes ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_killed_node_is_lost_at_once():
    coordinator = free_address()
    chief = start_join(0, 3, coordinator)
    with (
        NodeProcess(1, 3, coordinator, "import time; time.sleep(600)") as killed,
        NodeProcess(2, 3, coordinator, "nodes.gather(1)") as other,
    ):
        group = chief.result(TIMEOUT_SECONDS)
        assert killed.read_line() == "joined"
        killed.send_signal(signal.SIGKILL)
        with pytest.raises(UnavailableError) as raised:
            group.gather(1)
        assert str(raised.value) == KILLED
        group.fail(raised.value)
        assert (other.wait(), other.read_line(), other.read_line()) == (75, "joined", f"UnavailableError: {KILLED}")


def test_a_killed_chief_is_lost_at_once():
    coordinator = free_address()
    member = start_join(1, 2, coordinator)
    with NodeProcess(0, 2, coordinator, "nodes.gather(1); nodes.gather(1)") as chief:
        group = member.result(TIMEOUT_SECONDS)
        assert group.gather(2) == [1, 2]
        chief.send_signal(signal.SIGKILL)
        with pytest.raises(UnavailableError, match=r"^Lost node 0: "):
            group.gather(1)


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_node_is_lost_and_learns_why_when_it_continues(monkeypatch, frozen):
    monkeypatch.setattr(connection, "LOST_SECONDS", 6.0)
    coordinator = free_address()
    alive = start_join(1 - frozen, 2, coordinator)
    with NodeProcess(frozen, 2, coordinator, "nodes.gather(1); nodes.gather(1); nodes.gather(1)") as process:
        group = alive.result(TIMEOUT_SECONDS)
        assert group.gather(2) in ([1, 2], [2, 1])
        process.send_signal(signal.SIGSTOP)
        with pytest.raises(UnavailableError, match=rf"^Lost node {frozen}: it sent no heartbeat for 6 s\."):
            group.gather(1)
        group.fail(DataError("unused, because the first failure counts"))
        process.send_signal(signal.SIGCONT)
        assert process.wait() == 75


# ── Blocked threads ─────────────────────────────────────────────────────────────────────────────────────────────────

HOLD_THE_LOCK = "__import__('ctypes').PyDLL(None).sleep"
"""Calls `sleep` without releasing Python's global lock, as TensorFlow does while it connects to other nodes."""


def test_a_reply_is_sent_before_the_chief_blocks_its_threads():
    coordinator = free_address()
    member = start_join(1, 2, coordinator)
    with NodeProcess(0, 2, coordinator, f"nodes.broadcast('go'); {HOLD_THE_LOCK}(600)"):
        group = member.result(TIMEOUT_SECONDS)
        assert group.broadcast(None) == "go"
        group.close()


def test_a_node_that_announced_silence_is_not_lost(monkeypatch):
    monkeypatch.setattr(connection, "LOST_SECONDS", 2.0)
    coordinator = free_address()
    member = start_join(1, 2, coordinator)
    statements = f"nodes.broadcast(1)\n    with nodes.blocking(60): {HOLD_THE_LOCK}(5)\n    nodes.broadcast(2)"
    with NodeProcess(0, 2, coordinator, statements) as process:
        group = member.result(TIMEOUT_SECONDS)
        assert group.broadcast(None) == 1
        assert group.broadcast(None) == 2
        assert process.wait() == 0
        group.close()


def test_a_blocked_node_ends_and_leaves_its_error(tmp_path):
    coordinator = free_address()
    member = start_join(1, 2, coordinator)
    draft = tmp_path / "draft"
    statements = f"""
    from pathlib import Path
    nodes.on_failure(lambda error: None, draft=lambda error: Path({str(draft)!r}).write_text(str(error or "")))
    with nodes.blocking(1): {HOLD_THE_LOCK}(600)"""
    with NodeProcess(0, 2, coordinator, statements) as process:
        group = member.result(TIMEOUT_SECONDS)
        assert process.wait() == 75
        assert draft.read_text().startswith("Node 0 was blocked for 1 s while it connected to the other nodes.")
        with pytest.raises(UnavailableError, match=r"^Lost node 0: it closed the connection"):
            group.gather(1)


def test_a_node_that_was_not_blocked_for_long_continues(connect, tmp_path):
    groups = connect(2)
    drafts: list[str] = []
    groups[0].on_failure(lambda _: None, draft=lambda error: drafts.append(str(error or "")))
    with groups[0].blocking(1):
        pass
    time.sleep(1.5)
    assert on_all(groups, lambda group: group.gather(1)) == [[1, 1]] * 2
    assert [bool(draft) for draft in drafts] == [True, False]


def test_a_node_that_announced_silence_is_lost_afterwards(connect, monkeypatch):
    monkeypatch.setattr(connected_nodes, "FAILURE_REPORT_SECONDS", 0.2)
    monkeypatch.setattr(connected_nodes, "HEARTBEAT_SECONDS", 0.1)
    monkeypatch.setattr(connection, "HEARTBEAT_SECONDS", 600.0)
    groups = connect(2)
    with groups[1].blocking(60):
        time.sleep(0.5)
        assert groups[0].peer_failure() is None
    time.sleep(0.5)
    assert str(groups[0].peer_failure()).startswith("Lost node 1: it sent no heartbeat for")


def test_an_announcement_of_endless_silence_is_unexpected_data(connect):
    groups = connect(2)
    groups[1]._connections[0].send(json_frame(Kind.silence, seconds=10**6))
    with pytest.raises(UnavailableError, match="it announced silence for 1000000 seconds"):
        groups[0].gather(1)
