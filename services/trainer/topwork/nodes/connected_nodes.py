"""Several nodes that are connected through node 0: collective operations over TCP, and failures of the other nodes."""

import io
import json
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import structlog

from topwork.errors import TopworkError, UnavailableError
from topwork.nodes.connection import FLUSH_SECONDS, HEARTBEAT_SECONDS, LOST_SECONDS, Connection
from topwork.nodes.failure import Failure, failure_of, read_failure
from topwork.nodes.frames import Frame, FrameError, Kind, json_frame
from topwork.nodes.group import BLOCKING_SECONDS, NodeGroup
from topwork.nodes.node import Node
from topwork.nodes.watchdog import exit_after

if TYPE_CHECKING:
    import numpy.typing as npt

log = structlog.get_logger(__name__)

POLL_SECONDS = 0.5
REPORT_SECONDS = 60.0
FAILURE_REPORT_SECONDS = 5.0
"""Time in which a node that failed is known to the others, or has missed a heartbeat."""
EXIT_SECONDS = 25.0
"""Time for the main thread to end after another node failed: TensorFlow notices within ten seconds, if at all."""


class ConnectedNodes(NodeGroup):
    """Several nodes, each connected to node 0.

    A collective operation is one exchange: every node sends its contribution to node 0, which replies to all when the
    last one has arrived. No node leaves an operation before every node has entered it.

    Example:
        nodes = join(node, {}, is_complete=lambda: False, stop=stop)
        free_bytes = min(nodes.gather(shutil.disk_usage("/scratch").free))
    """

    def __init__(
        self,
        node: Node,
        facts: Sequence[dict[str, Any]],
        connections: Sequence[Connection],
        *,
        on_leave: Callable[[], None] = lambda: None,
    ) -> None:
        """Take over the connections of a rendezvous.

        Args:
            node: This node.
            facts: The facts of all nodes.
            connections: The connections to all other nodes on node 0, that to node 0 on other nodes.
            on_leave: Called when this node leaves the group.
        """
        super().__init__(node, facts)
        self._connections = {connection.index: connection for connection in connections}
        self._received: queue.SimpleQueue[tuple[int, Frame] | None] = queue.SimpleQueue()
        self._early: dict[int, Frame] = {}
        self._calls = 0
        self._lock = threading.Lock()
        self._failure: Failure | None = None
        self._on_failure: Callable[[TopworkError], None] | None = None
        self._draft: Callable[[TopworkError | None], None] = lambda _: None
        self._exit_timer: threading.Timer | None = None
        self._is_closed = False
        self._on_leave = on_leave
        for connection in connections:
            connection.receiver = self

    # ── Collective operations ─────────────────────────────────────────────────────────────────────────────────────

    def broadcast(self, value: Any) -> Any:
        """Return the value of the chief on every node, after every node has called this."""
        body = _to_json(value if self.is_chief else None)
        return json.loads(self._exchange("broadcast", body, lambda bodies: bodies[0]))

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all nodes, in the order of their indices."""
        values: list[Any] = json.loads(
            self._exchange("gather", _to_json(value), lambda bodies: b"[" + b",".join(bodies) + b"]")
        )
        return values

    def concatenate_on_chief(self, rows: "npt.NDArray[Any]") -> "npt.NDArray[Any] | None":
        """Concatenate an array of each node along its first axis; None on other nodes than the chief."""
        result: list[npt.NDArray[Any]] = []

        def concatenate(bodies: list[bytes]) -> bytes:
            result.append(_concatenate([_from_npy(body) for body in bodies]))
            return b""

        self._exchange("concatenate", _to_npy(rows), concatenate)
        return result[0] if result else None

    def _exchange(self, operation: str, body: bytes, reply: Callable[[list[bytes]], bytes]) -> bytes:
        """Send a contribution to node 0 and return its reply; on node 0, compute the reply from all contributions."""
        self._calls += 1
        call = f"{operation} {self._calls}"
        if not self.is_chief:
            self._connections[0].send(Frame(Kind.call, f"{call}\n".encode() + body))
            return self._next(0, call)
        answer = reply([body, *(self._next(index, call) for index in range(1, self.count))])
        self._send_to_all(Frame(Kind.reply, f"{call}\n".encode() + answer))
        return answer

    def _send_to_all(self, frame: Frame) -> None:
        """Send a frame, and wait until it was sent: the caller may block all threads next, see `blocking`."""
        for connection in self._connections.values():
            connection.send(frame)
        for connection in self._connections.values():
            connection.flush()

    def _next(self, index: int, call: str) -> bytes:
        """Wait for the frame of a node that belongs to a call."""
        reported = time.monotonic()
        while index not in self._early:
            self._raise_failure()
            if self._is_closed:
                raise RuntimeError(f"The nodes are disconnected: {call} came after close. This is a bug in topwork.")
            has_left = self._connections[index].has_ended
            try:
                received = self._received.get(timeout=POLL_SECONDS)
            except queue.Empty:
                self._raise_failure()
                if has_left:
                    raise UnavailableError(f"Node {index} has ended before {call}.") from None
                if time.monotonic() - reported > REPORT_SECONDS:
                    reported = time.monotonic()
                    log.debug("waiting for node", peer=index, operation=call)
                continue
            if received:
                self._early[received[0]] = received[1]
        name, _, body = self._early.pop(index).body.partition(b"\n")
        if (theirs := name.decode(errors="replace")) != call:
            raise RuntimeError(
                f"Node {index} is at operation {theirs!r}, node {self.index} at {call!r}. This is a bug in topwork."
            )
        return body

    # ── Failures ──────────────────────────────────────────────────────────────────────────────────────────────────

    def peer_failure(self) -> TopworkError | None:
        """Return why another node failed; waits a few seconds until it is known."""
        deadline = time.monotonic() + FAILURE_REPORT_SECONDS
        while self._failure is None and not self._is_closed and time.monotonic() < deadline:
            time.sleep(0.05)
        if self._failure is None and not self._is_closed:
            for connection in self._connections.values():
                if (seconds := connection.seconds_silent()) > 2 * HEARTBEAT_SECONDS:
                    self._report(Failure(connection.index, f"it sent no heartbeat for {seconds:.0f} s", "lost"))
        return self._failure.error() if self._failure else None

    def on_failure(
        self,
        callback: Callable[[TopworkError], None],
        *,
        draft: Callable[[TopworkError | None], None] = lambda _: None,
    ) -> None:
        """Call a function some time after another node failed, unless this node has left the group by then."""
        with self._lock:
            self._on_failure, self._draft = callback, draft
        if self._failure:
            self._start_exit_timer()

    @contextmanager
    def blocking(self, seconds: int = BLOCKING_SECONDS) -> Iterator[None]:
        """Announce that the block may block all threads of Python, and end the process if it takes too long."""
        error = UnavailableError(
            f"Node {self.index} was blocked for {seconds} s while it connected to the other nodes. Another node failed "
            "at the same time, or its ports are not reachable."
        )
        self._send_to_all(json_frame(Kind.silence, seconds=seconds + round(LOST_SECONDS)))
        self._draft(error)
        try:
            with exit_after(seconds, error.exit_code):
                yield
        finally:
            self._draft(None)
            self._send_to_all(json_frame(Kind.silence, seconds=0))

    def fail(self, error: BaseException) -> None:
        """Leave the group, and tell the other nodes why this one failed."""
        # If another node failed before, this node only follows: the others learn of the first failure.
        failure = self._failure or failure_of(self.index, error)
        self._leave(failure.frame())

    def close(self) -> None:
        """Leave the group in good order."""
        self._leave(Frame(Kind.leave))

    def _leave(self, frame: Frame) -> None:
        with self._lock:
            closed, self._is_closed = self._is_closed, True
            if self._exit_timer:
                self._exit_timer.cancel()
        if closed:
            return
        self._on_leave()
        for connection in self._connections.values():
            connection.close(frame)
        deadline = time.monotonic() + FLUSH_SECONDS
        for connection in self._connections.values():
            connection.join(deadline)

    def _raise_failure(self) -> None:
        if self._failure:
            raise self._failure.error()

    # ── Called in the threads of the connections ──────────────────────────────────────────────────────────────────

    def received(self, connection: Connection, frame: Frame) -> None:
        """Handle a frame of another node."""
        if frame.kind is Kind.failure:
            # The connection ends after this frame: that is not another failure.
            connection.close()
            self._report(read_failure(frame))
        elif frame.kind in {Kind.call, Kind.reply}:
            self._received.put((connection.index, frame))
        else:
            raise FrameError(f"a {frame.kind.name} frame during training")

    def lost(self, connection: Connection, reason: str) -> None:
        """Handle the loss of a node."""
        self._report(Failure(connection.index, reason, "lost"))

    def _report(self, failure: Failure) -> None:
        """Record the first failure, wake the main thread, and tell the other nodes."""
        with self._lock:
            if self._failure or self._is_closed:
                return
            self._failure = failure
        if failure.outcome == "stopped":
            log.info("node stopped", peer=failure.node, reason=failure.text)
        else:
            log.warning("node failed", peer=failure.node, outcome=failure.outcome, reason=failure.text)
        self._received.put(None)
        for connection in self._connections.values():
            if connection.index != failure.node:
                connection.send(failure.frame())
        self._start_exit_timer()

    def _start_exit_timer(self) -> None:
        with self._lock:
            if self._is_closed or self._on_failure is None or self._failure is None or self._exit_timer:
                return
            self._exit_timer = threading.Timer(EXIT_SECONDS, self._on_failure, (self._failure.error(),))
            self._exit_timer.daemon = True
            self._exit_timer.start()


def _to_json(value: Any) -> bytes:
    return json.dumps(value).encode()


def _to_npy(rows: "npt.NDArray[Any]") -> bytes:
    import numpy as np

    if rows.dtype.kind not in "biufc":
        raise TypeError(f"Rows of dtype {rows.dtype} cannot be sent to another node. Convert them to float32 first.")
    buffer = io.BytesIO()
    np.save(buffer, rows, allow_pickle=False)
    return buffer.getvalue()


def _from_npy(body: bytes) -> "npt.NDArray[Any]":
    import numpy as np

    rows: npt.NDArray[Any] = np.load(io.BytesIO(body), allow_pickle=False)
    return rows


def _concatenate(parts: "list[npt.NDArray[Any]]") -> "npt.NDArray[Any]":
    import numpy as np

    if len({(part.shape[1:], part.dtype) for part in parts}) > 1:
        described = ", ".join(f"{part.dtype} {part.shape}" for part in parts)
        raise RuntimeError(f"The nodes have rows of different kinds: {described}. This is a bug in topwork.")
    return np.concatenate(parts)
