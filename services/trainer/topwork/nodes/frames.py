"""Frames on the connection between two nodes: a kind, a length and a body of JSON or raw bytes, never pickle."""

import json
import socket
import struct
import time
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

PROTOCOL_VERSION = 1
MAX_CONTROL_BYTES = 1 << 16
"""Limit for a body that a stranger may send, or that reports a state or an error."""
MAX_START_BYTES = 1 << 24
MAX_DATA_BYTES = 1 << 34
CHUNK_BYTES = 1 << 20

_PREFIX = struct.Struct(">4sBQ")
_MAGIC = b"tpwk"


class Kind(IntEnum):
    """Kind of a frame."""

    hello = 1
    """The first frame of a node that joins: its index, what it runs, and its facts."""
    waiting = 2
    """From node 0: the hello was accepted, and these nodes are missing."""
    rejected = 3
    """From node 0: the hello was rejected, and why."""
    start = 4
    """From node 0: all nodes have joined; the facts of each."""
    heartbeat = 5
    call = 6
    """To node 0: the contribution of a node to a collective operation."""
    reply = 7
    """From node 0: the result of a collective operation."""
    failure = 8
    """A node failed or was stopped, or node 0 lost a node."""
    silence = 9
    """The sender may send no heartbeat for some seconds."""
    leave = 10
    """The sender has left the group in good order: the end of the connection is not a failure."""


LIMITS = {Kind.start: MAX_START_BYTES, Kind.call: MAX_DATA_BYTES, Kind.reply: MAX_DATA_BYTES}


class FrameError(Exception):
    """The other side does not send frames of this protocol, or a frame is too large."""


@dataclass(frozen=True)
class Frame:
    """A frame.

    Attributes:
        kind: Its kind.
        body: Its body; JSON for most kinds.
    """

    kind: Kind
    body: bytes = b""

    def values(self) -> dict[str, Any]:
        """Parse the body as a JSON object.

        Raises:
            FrameError: If it is not a JSON object.
        """
        try:
            values = json.loads(self.body)
        except (ValueError, RecursionError):
            values = None
        if not isinstance(values, dict):
            raise FrameError(f"the body of a {self.kind.name} frame is not a JSON object")
        return values


def json_frame(kind: Kind, **values: Any) -> Frame:
    """Create a frame with a JSON object."""
    return Frame(kind, json.dumps(values).encode())


def send_frame(sock: socket.socket, frame: Frame) -> None:
    """Send a frame. The timeout of the socket applies to each part of a large body.

    Raises:
        OSError: If the connection is lost, or the other side reads nothing for the timeout of the socket.
    """
    sock.sendall(_PREFIX.pack(_MAGIC, frame.kind, len(frame.body)))
    body = memoryview(frame.body)
    for start in range(0, len(body), CHUNK_BYTES):
        sock.sendall(body[start : start + CHUNK_BYTES])


def receive_frame(sock: socket.socket, *, deadline: float | None = None) -> Frame | None:
    """Receive a frame.

    Args:
        sock: The connection; its timeout applies to the time without any byte.
        deadline: Time of `time.monotonic` until which the whole frame must have arrived; None for no limit.

    Returns:
        The frame; None if the other side closed the connection.

    Raises:
        FrameError: If the bytes are not a frame of this protocol.
        OSError: If the connection is lost, or a time limit passed.
    """
    if (prefix := _receive(sock, _PREFIX.size, deadline)) is None:
        return None
    magic, number, length = _PREFIX.unpack(prefix)
    if magic != _MAGIC or number not in list(Kind):
        raise FrameError("the other side does not speak this protocol")
    kind = Kind(number)
    if length > (limit := LIMITS.get(kind, MAX_CONTROL_BYTES)):
        raise FrameError(f"a {kind.name} frame of {length} bytes exceeds the limit of {limit} bytes")
    body = _receive(sock, length, deadline)
    return None if body is None else Frame(kind, body)


def _receive(sock: socket.socket, length: int, deadline: float | None) -> bytes | None:
    buffer, received = bytearray(min(length, CHUNK_BYTES)), 0
    while received < length:
        if received == len(buffer):
            # The buffer grows with what arrives: a false length allocates no memory.
            buffer.extend(bytes(min(length, 2 * received) - received))
        if deadline is not None:
            sock.settimeout(max(0.001, deadline - time.monotonic()))
        with memoryview(buffer) as view:
            count = sock.recv_into(view[received:])
        if not count:
            return None
        received += count
    return bytes(buffer)
