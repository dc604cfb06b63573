"""The rendezvous of the nodes of a run: late, missing, duplicate and foreign nodes, and clients that are no nodes."""

import json
import signal
import socket
import struct
import threading
import time
from contextlib import closing

import pytest
from tests.nodes.connections import (
    TIMEOUT_SECONDS,
    NodeProcess,
    free_address,
    on_all,
    start_join,
    start_thread,
)

from topwork import __version__
from topwork.cancellation import StopInterrupt, StopRequest
from topwork.errors import SettingError, Stopped, UnavailableError
from topwork.nodes import addresses, coordinator_client, rendezvous
from topwork.nodes.addresses import connect, listen, split_address
from topwork.nodes.coordinator import Coordinator
from topwork.nodes.frames import Kind, json_frame, receive_frame, send_frame
from topwork.nodes.node import Node
from topwork.nodes.rendezvous import join


@pytest.fixture
def coordinator() -> str:
    return free_address()


def finish(*futures):
    """Wait for the groups, use each once, and disconnect them."""
    groups = [future.result(TIMEOUT_SECONDS) for future in futures]
    expected = list(range(len(groups)))
    assert on_all(groups, lambda group: group.gather(group.index)) == [expected] * len(groups)
    on_all(groups, lambda group: group.close())


def wait_until(condition):
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_single_node_joins_at_once():
    group = join(Node(), {"memory": 1}, is_complete=lambda: pytest.fail("called"), stop=StopRequest())
    assert (group.count, group.facts, group.gather(3)) == (1, [{"memory": 1}], [3])


def test_nodes_join_in_any_order(coordinator):
    late_first = []
    for index in (3, 1, 0, 2):
        late_first.append(start_join(index, 4, coordinator))
        time.sleep(0.1)
    finish(*(late_first[position] for position in (2, 1, 3, 0)))


def test_nodes_connect_over_ipv6():
    try:
        coordinator = free_address("::1")
    except OSError:
        pytest.skip("this machine has no IPv6 loopback address; enable IPv6 to run this test")
    finish(*(start_join(index, 2, coordinator) for index in range(2)))


def test_a_name_may_resolve_later(coordinator, monkeypatch):
    host, port = split_address(coordinator)
    resolves = threading.Event()
    resolve = socket.getaddrinfo

    def getaddrinfo(name, *args, **kwargs):
        if name != "cats-0.cats":
            return resolve(name, *args, **kwargs)
        if not resolves.is_set():
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return resolve(host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    name = f"cats-0.cats:{port}"
    chief, member = start_join(0, 2, name), start_join(1, 2, name)
    time.sleep(0.5)
    assert not member.done()
    resolves.set()
    finish(chief, member)


def test_the_nodes_wait_until_all_names_resolve(coordinator, monkeypatch):
    monkeypatch.setattr(rendezvous, "NAME_POLL_SECONDS", 0.05)
    resolves = threading.Event()
    problem = "Name or service not known"
    monkeypatch.setattr(rendezvous, "resolve", lambda _: None if resolves.is_set() else problem)
    waiting = [start_join(index, 2, coordinator) for index in range(2)]
    time.sleep(0.5)
    assert [future.done() for future in waiting] == [False, False]
    resolves.set()
    finish(*waiting)


def test_a_name_that_never_resolves_ends_all_nodes(coordinator, monkeypatch):
    monkeypatch.setattr(rendezvous, "NAMES_SECONDS", 0.0)
    monkeypatch.setattr(rendezvous, "NAME_POLL_SECONDS", 0.05)
    monkeypatch.setattr(rendezvous, "resolve", lambda _: "Name or service not known")
    waiting = [start_join(index, 2, coordinator) for index in range(2)]
    for future in waiting:
        with pytest.raises(UnavailableError, match=r"^Cannot resolve 127\.0\.0\.1:1 \(Name or service not known\)"):
            future.result(TIMEOUT_SECONDS)


def test_a_missing_node_ends_the_wait_of_all(coordinator):
    chief, member = (start_join(index, 3, coordinator, timeout=timeout) for index, timeout in ((0, 2.5), (1, 4.0)))
    with pytest.raises(UnavailableError) as raised:
        chief.result(TIMEOUT_SECONDS)
    assert str(raised.value) == (
        "Waited 2.5 s for node 2 of 3. Check whether the other pods of the run are pending, and whether this one can "
        f"reach them at {coordinator}."
    )
    with pytest.raises(UnavailableError) as raised:
        member.result(TIMEOUT_SECONDS)
    assert str(raised.value).startswith("Waited 4 s for node 0 of 3. Last problem: ")


def test_a_member_names_the_nodes_that_the_chief_waits_for(coordinator):
    chief = start_join(0, 4, coordinator)
    member = start_join(1, 4, coordinator, timeout=1.5)
    with pytest.raises(UnavailableError, match=r"^Waited 1.5 s for nodes 2, 3 of 4\."):
        member.result(TIMEOUT_SECONDS)
    finish(chief, *(start_join(index, 4, coordinator) for index in (1, 2, 3)))


def test_a_missing_chief_ends_the_wait(coordinator):
    with pytest.raises(UnavailableError) as raised:
        start_join(1, 2, coordinator, timeout=1).result(TIMEOUT_SECONDS)
    assert str(raised.value) == (
        f"Waited 1 s for node 0 of 2. Last problem: cannot connect to {coordinator} (Connection refused). Check "
        f"whether the other pods of the run are pending, and whether this one can reach them at {coordinator}."
    )


@pytest.mark.parametrize("index", [0, 1])
def test_work_that_is_complete_ends_the_wait(coordinator, monkeypatch, index):
    monkeypatch.setattr(rendezvous, "COMPLETE_SECONDS", 0.1)
    answers = iter([False, False, True])
    assert start_join(index, 2, coordinator, is_complete=lambda: next(answers)).result(TIMEOUT_SECONDS) is None


def test_the_port_is_free_after_the_wait(coordinator, monkeypatch):
    monkeypatch.setattr(rendezvous, "COMPLETE_SECONDS", 0.1)
    assert start_join(0, 2, coordinator, is_complete=lambda: True).result(TIMEOUT_SECONDS) is None
    finish(*(start_join(index, 2, coordinator) for index in range(2)))


def test_an_error_of_the_check_ends_the_wait(coordinator, monkeypatch):
    monkeypatch.setattr(rendezvous, "COMPLETE_SECONDS", 0.1)

    def is_complete():
        raise UnavailableError("storage")

    with pytest.raises(UnavailableError, match=r"^storage$"):
        start_join(0, 2, coordinator, is_complete=is_complete).result(TIMEOUT_SECONDS)


@pytest.mark.parametrize("index", [0, 1])
def test_a_stop_ends_the_wait(coordinator, index):
    stop = StopRequest()
    waiting = start_join(index, 2, coordinator, stop=stop)
    time.sleep(0.2)
    with pytest.raises(StopInterrupt):
        stop.set()
    with pytest.raises(Stopped):
        waiting.result(TIMEOUT_SECONDS)


def test_the_others_wait_for_the_next_process_of_a_stopped_node(coordinator):
    member = start_join(1, 3, coordinator)
    stop = StopRequest()
    chief = start_join(0, 3, coordinator, stop=stop)
    time.sleep(0.5)
    with pytest.raises(StopInterrupt):
        stop.set()
    with pytest.raises(Stopped):
        chief.result(TIMEOUT_SECONDS)
    assert not member.done()
    finish(start_join(0, 3, coordinator), member, start_join(2, 3, coordinator))


def test_a_killed_node_is_replaced_while_the_others_wait(coordinator):
    chief = start_join(0, 3, coordinator)
    with NodeProcess(1, 3, coordinator, "pass") as process:
        member = start_join(2, 3, coordinator)
        assert process.read_line() == "joined"
        finish_later = chief.result(TIMEOUT_SECONDS), member.result(TIMEOUT_SECONDS)
    assert [group.count for group in finish_later] == [3, 3]


def test_a_killed_process_does_not_count_as_present(coordinator):
    node = Node(0, ("127.0.0.1:1",) * 3, coordinator, TIMEOUT_SECONDS)
    chief = Coordinator(node, {}, {"version": __version__})
    with NodeProcess(1, 3, coordinator, "pass") as process:
        wait_until(lambda: chief.missing() == [2])
        process.send_signal(signal.SIGKILL)
        wait_until(lambda: chief.missing() == [1, 2])
    members = [start_join(index, 3, coordinator) for index in (1, 2)]
    group = chief.wait(TIMEOUT_SECONDS)
    finish(start_thread(lambda: group), *members)


def test_the_newest_process_of_a_node_replaces_the_earlier_one(coordinator):
    chief = start_join(0, 3, coordinator)
    earlier = start_join(1, 3, coordinator)
    time.sleep(0.5)
    newest = start_join(1, 3, coordinator)
    with pytest.raises(UnavailableError, match=r"^Node 0 disconnected this node: another process has joined as node 1"):
        earlier.result(TIMEOUT_SECONDS)
    finish(chief, newest, start_join(2, 3, coordinator))


def test_a_node_that_comes_after_the_start_joins_the_next_group(coordinator):
    chief, member = start_join(0, 2, coordinator), start_join(1, 2, coordinator)
    groups = [future.result(TIMEOUT_SECONDS) for future in (chief, member)]
    late = start_join(1, 2, coordinator)
    time.sleep(0.5)
    assert not late.done()
    assert on_all(groups, lambda group: group.gather(1)) == [[1, 1]] * 2
    on_all(groups, lambda group: group.close())
    finish(start_join(0, 2, coordinator), late)


@pytest.mark.parametrize(
    ("count", "identity", "reason"),
    [
        (2, {"run": "dogs-1"}, "its run is 'dogs-1', that of node 0 is 'cats-1'"),
        (2, {}, "its run is None, that of node 0 is 'cats-1'"),
        (2, {"run": "x" * 1000}, f"its run is '{'x' * 78}…, that of node 0 is 'cats-1'"),
        (3, {"run": "cats-1"}, "its number of nodes is 3, that of node 0 is 2"),
    ],
)
def test_a_node_of_another_run_is_rejected(coordinator, monkeypatch, count, identity, reason):
    monkeypatch.setattr(coordinator_client, "REJECTED_SECONDS", 0.5)
    chief = start_join(0, 2, coordinator, identity={"run": "cats-1"})
    with pytest.raises(UnavailableError) as raised:
        start_join(1, count, coordinator, identity=identity).result(TIMEOUT_SECONDS)
    assert str(raised.value) == (
        f"Node 0 has not admitted this node for 0.5 s: node 0 rejected this node: {reason}. All nodes must run the "
        "same job with the same image."
    )
    finish(chief, start_join(1, 2, coordinator, identity={"run": "cats-1"}))


def test_a_node_of_another_version_is_rejected(coordinator, monkeypatch):
    monkeypatch.setattr(coordinator_client, "REJECTED_SECONDS", 0.5)
    chief = start_join(0, 2, coordinator)
    wait_until(lambda: _listens(coordinator))
    monkeypatch.setattr(rendezvous, "__version__", "9.9.9")
    with pytest.raises(UnavailableError, match=f"its version is '9.9.9', that of node 0 is '{__version__}'"):
        start_join(1, 2, coordinator).result(TIMEOUT_SECONDS)
    monkeypatch.undo()
    finish(chief, start_join(1, 2, coordinator))


def _listens(address: str) -> bool:
    try:
        connect(address).close()
    except OSError:
        return False
    return True


# ── Clients that are no nodes ───────────────────────────────────────────────────────────────────────────────────────

HELLO = {"protocol": 1, "identity": {"version": __version__}, "index": 1, "count": 2, "facts": {}}


def _prefix(kind: int, length: int, magic: bytes = b"tpwk") -> bytes:
    return struct.pack(">4sBQ", magic, kind, length)


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01" + bytes(200),
        bytes(range(256)) * 300,
        _prefix(1, 1 << 62),
        _prefix(1, 1 << 17),
        _prefix(99, 0),
        _prefix(6, 1 << 33) + bytes(1000),
        _prefix(5, 0) * 100,
        _prefix(1, 4) + b"null",
        _prefix(1, 5) + b"{bad}",
        _prefix(1, 60000) + b"[" * 60000,
        _prefix(1, 60000) + b'{"index":' + b"9" * 59990 + b"}",
        _prefix(1, 2) + b"{}",
        *(
            _prefix(1, len(body)) + body
            for change in (
                {"index": 0},
                {"index": 2},
                {"index": -1},
                {"index": True},
                {"index": 1.0},
                {"index": "1"},
                {"index": None},
                {"count": "2"},
                {"facts": None},
                {"identity": []},
                {"protocol": 2},
            )
            for body in [json.dumps({**HELLO, **change}).encode()]
        ),
    ],
)
def test_a_client_that_is_no_node_is_disconnected_and_disturbs_nothing(coordinator, monkeypatch, sent):
    monkeypatch.setattr("topwork.nodes.coordinator.HELLO_SECONDS", 1.0)
    chief = start_join(0, 2, coordinator)
    wait_until(lambda: _listens(coordinator))
    with closing(connect(coordinator)) as client:
        client.settimeout(TIMEOUT_SECONDS)
        try:
            client.sendall(sent)
            if not sent:
                client.shutdown(socket.SHUT_WR)
            # A reason may come first; then the connection ends.
            while client.recv(1 << 16):
                pass
        except ConnectionError:
            pass
        assert not chief.done()
        finish(chief, start_join(1, 2, coordinator))


def test_silent_clients_do_not_block_a_node(coordinator):
    chief = start_join(0, 2, coordinator)
    wait_until(lambda: _listens(coordinator))
    clients = [connect(coordinator) for _ in range(20)]
    finish(chief, start_join(1, 2, coordinator))
    for client in clients:
        client.close()


def test_a_node_may_join_while_clients_take_all_places(coordinator, monkeypatch):
    monkeypatch.setattr("topwork.nodes.coordinator.HELLO_SECONDS", 1.0)
    chief = start_join(0, 2, coordinator)
    wait_until(lambda: _listens(coordinator))
    clients = [connect(coordinator) for _ in range(100)]
    finish(chief, start_join(1, 2, coordinator))
    for client in clients:
        client.close()


def test_a_client_that_sends_one_byte_at_a_time_is_disconnected(coordinator, monkeypatch):
    monkeypatch.setattr("topwork.nodes.coordinator.HELLO_SECONDS", 0.5)
    chief = start_join(0, 2, coordinator)
    wait_until(lambda: _listens(coordinator))
    with closing(connect(coordinator)) as client, pytest.raises(OSError):
        for byte in _prefix(1, 60000) + bytes(60000):
            client.sendall(bytes([byte]))
            time.sleep(0.05)
    finish(chief, start_join(1, 2, coordinator))


def test_a_node_that_sends_garbage_after_its_hello_is_lost(coordinator):
    chief = start_join(0, 2, coordinator)
    wait_until(lambda: _listens(coordinator))
    with closing(connect(coordinator)) as client:
        send_frame(client, json_frame(Kind.hello, **HELLO))
        group = chief.result(TIMEOUT_SECONDS)
        frame = receive_frame(client)
        assert frame
        assert (frame.kind, frame.values()) == (Kind.start, {"facts": [{"thread": 0}, {}]})
        client.sendall(b"garbage" * 10)
        with pytest.raises(UnavailableError, match="Lost node 1: it sent unexpected data"):
            group.gather(1)
        group.close()


def test_another_server_at_the_address_is_a_problem_and_not_a_failure(coordinator):
    with closing(listen(coordinator)) as server:
        member = start_join(1, 2, coordinator, timeout=3)
        client, _ = server.accept()
        client.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        with pytest.raises(UnavailableError, match=r"Last problem: lost node 0: it sent unexpected data"):
            member.result(TIMEOUT_SECONDS)
        client.close()


# ── Addresses ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("address", "expected"),
    [("cats-0.cats:9122", ("cats-0.cats", 9122)), ("10.0.0.1:1", ("10.0.0.1", 1)), ("[::1]:65535", ("::1", 65535))],
)
def test_an_address_is_split(address, expected):
    assert split_address(address) == expected


@pytest.mark.parametrize(
    "address", ["", "host", "host:", ":1", "host:0", "host:65536", "host:x", "host:-1", "::1:9122", "[host]:1", "h:²"]
)
def test_a_malformed_address_is_reported(address):
    with pytest.raises(SettingError, match="is not an address of a node: expected host:port"):
        split_address(address)


def test_a_port_in_use_is_reported(coordinator, monkeypatch):
    monkeypatch.setattr(addresses, "BIND_SECONDS", 0.3)
    with closing(listen(coordinator)), pytest.raises(UnavailableError, match=f"Cannot listen at {coordinator}"):
        listen(coordinator)


def test_a_loopback_address_is_not_reachable_from_other_machines(coordinator):
    with closing(listen(coordinator)) as server:
        assert server.getsockname()[0] == "127.0.0.1"


def test_a_name_listens_on_all_interfaces(coordinator):
    port = split_address(coordinator)[1]
    with closing(listen(f"cats-0.cats:{port}")) as server, closing(connect(coordinator)):
        assert server.getsockname()[0] in {"::", "0.0.0.0"}
