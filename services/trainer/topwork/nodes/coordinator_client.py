"""Where the other nodes wait: each connects to node 0, again and again until the group starts."""

import queue
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from topwork.errors import UnavailableError
from topwork.nodes.addresses import connect
from topwork.nodes.connected_nodes import ConnectedNodes
from topwork.nodes.connection import Connection, describe_error
from topwork.nodes.failure import failure_of, read_failure
from topwork.nodes.frames import PROTOCOL_VERSION, Frame, FrameError, Kind, json_frame
from topwork.nodes.node import Node

RETRY_SECONDS = (0.2, 2.0)
"""First and longest wait before the next attempt to connect."""
POLL_SECONDS = 0.1
CLOSE_SECONDS = 1.0
REJECTED_SECONDS = 120.0
"""Time after which a rejected node ends. The process of node 0 that rejects it may be the previous one, which ends."""


class CoordinatorClient:
    """A node other than node 0 until the group starts.

    Attributes:
        problem: Why the last attempt failed; empty while the node is connected.
    """

    def __init__(self, node: Node, facts: dict[str, Any], identity: Mapping[str, str]) -> None:
        """Start to connect, in a background thread: the resolution of a name can block for many seconds."""
        self.problem = ""
        self._node = node
        self._hello = json_frame(
            Kind.hello,
            protocol=PROTOCOL_VERSION,
            identity=dict(identity),
            index=node.index,
            count=node.count,
            facts=facts,
        )
        self._missing: list[int] = [0]
        self._connection: Connection | None = None
        self._rejected_since: float | None = None
        self._replaced = ""
        self._is_closed = False
        self._started: queue.SimpleQueue[ConnectedNodes] = queue.SimpleQueue()
        self._group: ConnectedNodes | None = None
        threading.Thread(target=self._run, name="coordinator-client", daemon=True).start()

    def wait(self, seconds: float) -> ConnectedNodes | None:
        """Wait for the connected group; None if it has not started in time.

        Raises:
            UnavailableError: If node 0 does not admit this node.
        """
        with suppress(queue.Empty):
            return self._started.get(timeout=seconds)
        if self._replaced:
            raise UnavailableError(f"Node 0 disconnected this node: {self._replaced}.")
        since = self._rejected_since
        if since is not None and time.monotonic() - since > REJECTED_SECONDS:
            raise UnavailableError(
                f"Node 0 has not admitted this node for {REJECTED_SECONDS:g} s: {self.problem}. All nodes must run the "
                "same job with the same image."
            )
        return None

    def missing(self) -> list[int]:
        """Return the indices of the nodes that are not connected, as far as known: node 0, or those it waits for."""
        connection = self._connection
        return [0] if connection is None or connection.has_ended else self._missing

    def close(self) -> None:
        """Stop waiting."""
        self._end(Frame(Kind.leave))

    def fail(self, error: BaseException) -> None:
        """Stop waiting because of an error. Node 0 then waits for the next process of this node."""
        self._end(failure_of(self._node.index, error).frame())

    def _end(self, frame: Frame) -> None:
        self._is_closed = True
        if connection := self._connection:
            connection.close(frame)
            connection.join(time.monotonic() + CLOSE_SECONDS)

    # ── Called in other threads ───────────────────────────────────────────────────────────────────────────────────

    def _run(self) -> None:
        delay, longest = RETRY_SECONDS
        while not self._is_closed and not self._replaced:
            try:
                connection = Connection(connect(self._node.coordinator), 0, self)
            except OSError as error:
                self.problem = f"cannot connect to {self._node.coordinator} ({describe_error(error)})"
                self._rejected_since = None
            else:
                connection.send(self._hello)
                connection.start()
                self._connection = connection
                while not connection.has_ended and not self._is_closed:
                    time.sleep(POLL_SECONDS)
                if self._group:
                    return
            time.sleep(delay)
            delay = min(longest, 1.5 * delay)

    def received(self, connection: Connection, frame: Frame) -> None:
        """Handle a frame of node 0."""
        if frame.kind is Kind.start:
            self._start(connection, frame)
        elif frame.kind is Kind.waiting:
            missing = frame.values().get("missing")
            if not isinstance(missing, list):
                raise FrameError("a waiting frame does not name the missing nodes")
            self._missing, self.problem, self._rejected_since = missing, "", None
        elif frame.kind is Kind.rejected:
            self._reject(connection, frame.values())
        elif frame.kind is Kind.failure:
            self.problem = f"node 0 ended: {read_failure(frame).text}"
            connection.close()
        else:
            raise FrameError(f"a {frame.kind.name} frame before the start")

    def _start(self, connection: Connection, frame: Frame) -> None:
        facts = frame.values().get("facts")
        if not isinstance(facts, list) or len(facts) != self._node.count:
            raise FrameError("a start frame does not have the facts of all nodes")
        self._group = ConnectedNodes(self._node, facts, [connection])
        self._started.put(self._group)

    def _reject(self, connection: Connection, values: dict[str, Any]) -> None:
        self.problem = f"node 0 rejected this node: {values.get('reason')}"
        if values.get("final"):
            self._replaced = str(values.get("reason"))
        elif self._rejected_since is None:
            self._rejected_since = time.monotonic()
        connection.close()

    def lost(self, connection: Connection, reason: str) -> None:
        """Handle the loss of node 0, which may have happened at the moment of the start."""
        if self._group:
            self._group.lost(connection, reason)
        self.problem = f"lost node 0: {reason}"
