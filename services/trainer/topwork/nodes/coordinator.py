"""Where node 0 waits for the others: it accepts connections, checks who they are, and rejects everything else."""

import queue
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import structlog

from topwork.errors import shorten
from topwork.nodes.addresses import listen
from topwork.nodes.connected_nodes import ConnectedNodes
from topwork.nodes.connection import Connection
from topwork.nodes.failure import failure_of
from topwork.nodes.frames import PROTOCOL_VERSION, Frame, FrameError, Kind, json_frame, receive_frame, send_frame
from topwork.nodes.node import Node

log = structlog.get_logger(__name__)

HELLO_SECONDS = 5.0
"""Time for a client to say who it is."""
CLOSE_SECONDS = 1.0
MAX_UNKNOWN_CLIENTS = 64
"""Clients that have not said who they are; further ones are disconnected."""
MAX_LOGGED_REJECTIONS = 20
MAX_QUOTED_CHARACTERS = 80


class _RejectedError(Exception):
    """Why a client is not a node of this run."""


class Coordinator:
    """Node 0: waits until all others have connected, and listens until the group ends.

    A node that connects again, because its process was restarted, replaces its earlier connection. After the start,
    further nodes are told to try again: they connect to the next process of node 0.

    Attributes:
        problem: Why the last client was rejected; empty if none was.
    """

    def __init__(self, node: Node, facts: dict[str, Any], identity: Mapping[str, str]) -> None:
        """Listen at the address of the coordinator."""
        self.problem = ""
        self._node, self._identity = node, dict(identity)
        self._facts: dict[int, dict[str, Any]] = {0: facts}
        self._connections: dict[int, Connection] = {}
        self._lock = threading.Lock()
        self._group: ConnectedNodes | None = None
        self._is_closed = False
        self._started: queue.SimpleQueue[ConnectedNodes] = queue.SimpleQueue()
        self._unknown_clients = threading.BoundedSemaphore(MAX_UNKNOWN_CLIENTS)
        self._rejections = 0
        self._listener = listen(node.coordinator)
        threading.Thread(target=self._accept, name="coordinator", daemon=True).start()

    def wait(self, seconds: float) -> ConnectedNodes | None:
        """Wait for the connected group; None if it is not complete in time."""
        with suppress(queue.Empty):
            return self._started.get(timeout=seconds)
        return None

    def missing(self) -> list[int]:
        """Return the indices of the nodes that are not connected."""
        with self._lock:
            return self._missing()

    def close(self) -> None:
        """Stop listening, and disconnect the nodes that are waiting: they find out by themselves what to do."""
        self._end(Frame(Kind.leave))

    def fail(self, error: BaseException) -> None:
        """Stop listening, and tell the nodes that are waiting why."""
        self._end(failure_of(0, error).frame())

    def _end(self, frame: Frame) -> None:
        with self._lock:
            self._is_closed = True
            connections = list(self._connections.values())
        self._stop_listening()
        for connection in connections:
            connection.close(frame)
        deadline = time.monotonic() + CLOSE_SECONDS
        for connection in connections:
            connection.join(deadline)

    def _stop_listening(self) -> None:
        # Closing alone would not end `accept` in the other thread.
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _missing(self) -> list[int]:
        connections = self._connections
        return [i for i in range(1, self._node.count) if i not in connections or connections[i].has_ended]

    # ── Called in other threads ───────────────────────────────────────────────────────────────────────────────────

    def _accept(self) -> None:
        while True:
            try:
                sock, address = self._listener.accept()
            except OSError:
                if self._listener.fileno() < 0:
                    return
                time.sleep(0.1)  # too many open files, or the client has gone
                continue
            if not self._unknown_clients.acquire(blocking=False):
                sock.close()
                continue
            threading.Thread(target=self._admit, args=(sock, address[0]), name="hello", daemon=True).start()

    def _admit(self, sock: socket.socket, address: str) -> None:
        """Let a client join, or disconnect it."""
        try:
            sock.settimeout(HELLO_SECONDS)
            index, facts = self._check(receive_frame(sock, deadline=time.monotonic() + HELLO_SECONDS))
            self._welcome(sock, index, facts)
        except _RejectedError as error:
            self._log_rejection(address, str(error))
            with suppress(OSError):
                sock.settimeout(HELLO_SECONDS)
                send_frame(sock, json_frame(Kind.rejected, reason=str(error)))
            sock.close()
        except (FrameError, OSError) as error:
            self._log_rejection(address, f"it is not a node of topwork: {error}")
            sock.close()
        finally:
            self._unknown_clients.release()

    def _check(self, hello: Frame | None) -> tuple[int, dict[str, Any]]:
        """Return the index and the facts of a node from its first frame."""
        if hello is None or hello.kind is not Kind.hello:
            raise FrameError("it sent no hello")
        values = hello.values()
        if (protocol := values.get("protocol")) != PROTOCOL_VERSION:
            raise _RejectedError(_difference("protocol", protocol, PROTOCOL_VERSION))
        identity = values.get("identity")
        for name, ours in self._identity.items():
            theirs = identity.get(name) if isinstance(identity, dict) else None
            if theirs != ours:
                raise _RejectedError(_difference(name, theirs, ours))
        index, count, facts = values.get("index"), values.get("count"), values.get("facts")
        if count != self._node.count:
            raise _RejectedError(_difference("number of nodes", count, self._node.count))
        if type(index) is not int or not 0 < index < self._node.count:
            raise _RejectedError(f"its index is {_quote(index)}: expected 1 to {self._node.count - 1}")
        if not isinstance(facts, dict):
            raise FrameError("its hello has no facts")
        return index, facts

    def _welcome(self, sock: socket.socket, index: int, facts: dict[str, Any]) -> None:
        with self._lock:
            if self._is_closed:
                raise _RejectedError("node 0 is ending")
            if self._group:
                raise _RejectedError("the nodes have started without it; it can join after they have restarted")
            if (earlier := self._connections.pop(index, None)) and not earlier.has_ended:
                text = f"another process has joined as node {index}"
                earlier.close(json_frame(Kind.rejected, reason=text, final=True))
            connection = self._connections[index] = Connection(sock, index, self)
            connection.start()
            self._facts[index] = facts
            missing = self._missing()
            if not missing:
                self._start()
                return
            for connected in self._connections.values():
                connected.send(json_frame(Kind.waiting, missing=missing))

    def _start(self) -> None:
        connections = [self._connections[index] for index in range(1, self._node.count)]
        facts = [self._facts[index] for index in range(self._node.count)]
        self._group = ConnectedNodes(self._node, facts, connections, on_leave=self._stop_listening)
        for connection in connections:
            connection.send(json_frame(Kind.start, facts=facts))
        self._started.put(self._group)

    def _log_rejection(self, address: str, reason: str) -> None:
        self.problem = f"a client at {address} was rejected: {reason}"
        self._rejections += 1
        if self._rejections <= MAX_LOGGED_REJECTIONS:
            log.warning("client rejected", address=address, reason=reason)

    def received(self, connection: Connection, frame: Frame) -> None:
        """Handle a frame of a node that is waiting: it only ever reports why it ends."""
        if frame.kind is not Kind.failure:
            raise FrameError(f"a {frame.kind.name} frame before the start")
        connection.close()

    def lost(self, connection: Connection, reason: str) -> None:
        """Handle the loss of a node, which may have happened at the moment of the start."""
        with self._lock:
            group = self._group
        if group:
            group.lost(connection, reason)
        else:
            log.info("node disconnected while waiting", peer=connection.index, reason=reason)


def _difference(name: str, theirs: object, ours: object) -> str:
    return f"its {name} is {_quote(theirs)}, that of node 0 is {_quote(ours)}"


def _quote(value: object) -> str:
    return shorten(repr(value), MAX_QUOTED_CHARACTERS)
