"""A connection to another node: sends and receives frames in background threads, and notices when the node is lost."""

import queue
import socket
import threading
import time
from contextlib import suppress
from typing import Protocol

from topwork.nodes.frames import Frame, FrameError, Kind, receive_frame, send_frame

HEARTBEAT_SECONDS = 3.0
LOST_SECONDS = 20.0
"""Time without any byte after which a node counts as lost. A busy machine delays the heartbeats of a live node."""
MAX_SILENCE_SECONDS = 600
POLL_SECONDS = 0.5
FLUSH_SECONDS = 3.0
"""Time for the last frames when a connection is closed."""


class Receiver(Protocol):
    """Handles what a connection receives. Called in the threads of the connection."""

    def received(self, connection: "Connection", frame: Frame) -> None:
        """Handle a frame."""

    def lost(self, connection: "Connection", reason: str) -> None:
        """Handle the end of the connection without a `leave` frame; called at most once."""


class Connection:
    """A connection to another node.

    Only the background threads use the socket: a stop request interrupts the main thread at any moment, and a frame
    that was sent in part would make the connection useless for reporting the stop.

    Attributes:
        index: Index of the node at the other end.
        receiver: Handles what is received.
    """

    def __init__(self, sock: socket.socket, index: int, receiver: Receiver) -> None:
        """Take over a connected socket. `start` starts the threads."""
        self.index, self.receiver = index, receiver
        self._socket = sock
        self._outbox: queue.SimpleQueue[Frame | threading.Event | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._has_ended = False
        self._last_received = time.monotonic()
        self._silence_until = 0.0
        self._threads = [
            threading.Thread(target=target, name=f"node-{index}-{target.__name__.strip('_')}", daemon=True)
            for target in (self._send, self._receive)
        ]

    def start(self) -> None:
        """Start to send and receive."""
        self._socket.settimeout(LOST_SECONDS)
        # A reply of a few bytes must not wait for the acknowledgement of the previous one.
        with suppress(OSError):
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for thread in self._threads:
            thread.start()

    def send(self, frame: Frame) -> None:
        """Queue a frame to be sent."""
        self._outbox.put(frame)

    def flush(self) -> None:
        """Wait until everything queued was handed to the operating system, or the connection has ended."""
        flushed = threading.Event()
        self._outbox.put(flushed)
        while not flushed.wait(POLL_SECONDS) and not self._has_ended:
            pass

    def seconds_silent(self) -> float:
        """Time since the other node sent anything, in seconds; 0 while it has announced silence."""
        now = time.monotonic()
        return 0.0 if now < self._silence_until else now - self._last_received

    def close(self, *frames: Frame) -> None:
        """Close the connection after its last frames.

        Args:
            *frames: Frames to send before, such as the reason.
        """
        self._end()
        for frame in frames:
            self._outbox.put(frame)
        self._outbox.put(None)

    @property
    def has_ended(self) -> bool:
        """Whether the connection was closed by either node, or lost."""
        return self._has_ended

    def join(self, deadline: float) -> None:
        """Wait until a closed connection has sent its last frames and the other node has closed its end.

        Args:
            deadline: Time of `time.monotonic` until which to wait.
        """
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))

    def _end(self) -> bool:
        """Mark the connection as ended, so that its loss is not reported; return whether it was not ended before."""
        with self._lock:
            ended, self._has_ended = self._has_ended, True
            return not ended

    def _lose(self, reason: str) -> None:
        if self._end():
            self.receiver.lost(self, reason)
        self._outbox.put(None)

    def _send(self) -> None:
        try:
            while True:
                frame: Frame | threading.Event | None = Frame(Kind.heartbeat)
                with suppress(queue.Empty):
                    frame = self._outbox.get(timeout=HEARTBEAT_SECONDS)
                if frame is None:
                    break
                if isinstance(frame, threading.Event):
                    frame.set()
                else:
                    send_frame(self._socket, frame)
            # The other node reads everything up to here, then closes its end.
            self._socket.shutdown(socket.SHUT_WR)
        except OSError as error:
            self._lose(f"the connection failed ({describe_error(error)})")
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    def _receive(self) -> None:
        try:
            while (frame := self._next_frame()) is not None:
                self._last_received = time.monotonic()
                if frame.kind is Kind.silence:
                    self._expect_silence(frame)
                elif frame.kind is Kind.leave:
                    self._end()
                    self._outbox.put(None)
                elif frame.kind is not Kind.heartbeat:
                    self.receiver.received(self, frame)
            self._lose("it closed the connection without a message, as a killed process does")
        except TimeoutError:
            self._lose(f"it sent no heartbeat for {LOST_SECONDS:g} s")
        except OSError as error:
            self._lose(f"the connection failed ({describe_error(error)})")
        except FrameError as error:
            self._lose(f"it sent unexpected data ({error})")
        finally:
            # The sender thread gets a short time for frames that are still queued.
            self._threads[0].join(FLUSH_SECONDS)
            self._socket.close()

    def _next_frame(self) -> Frame | None:
        self._socket.settimeout(max(LOST_SECONDS, self._silence_until - time.monotonic()))
        return receive_frame(self._socket)

    def _expect_silence(self, frame: Frame) -> None:
        seconds = frame.values().get("seconds")
        if not isinstance(seconds, int) or not 0 <= seconds <= MAX_SILENCE_SECONDS:
            raise FrameError(f"it announced silence for {seconds!r} seconds")
        self._silence_until = time.monotonic() + seconds


def describe_error(error: OSError) -> str:
    """Describe an error of a socket in a few words."""
    return error.strerror or str(error) or type(error).__name__
