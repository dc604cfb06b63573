"""Processes of nodes: where they run, and their logs and ends."""

import random
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.chaos.interrupted_run import parse_lines

PORTS = range(15000, 29000)  # below the ports of outgoing connections
ENTER_NAMESPACE = """
import ctypes, os, runpy, sys
if ctypes.CDLL(None, use_errno=True).setns(os.open(sys.argv[1], os.O_RDONLY), 0x40000000):
    raise OSError(ctypes.get_errno(), "setns", sys.argv[1])
sys.argv = ["topwork", *sys.argv[2:]]
runpy.run_module("topwork", run_name="__main__", alter_sys=True)
"""


@dataclass(frozen=True)
class Place:
    """Where a node runs.

    Attributes:
        host: Its address.
        endpoint: URL of the S3 server as seen from there.
        namespace: File of its network namespace; empty for that of this process.
    """

    host: str
    endpoint: str
    namespace: str = ""


class NodeProcess:
    """The process of one stage on one node."""

    def __init__(self, node: int, stage: str, log: Path, process: Any) -> None:
        self.node, self.stage, self.process = node, stage, process
        self.started = time.monotonic()
        self.ended: float | None = None
        self.signals: list[int] = []
        self.log = log

    def poll(self) -> int | None:
        code: int | None = self.process.poll()
        if code is not None and self.ended is None:
            self.ended = time.monotonic()
        return code

    def has_logged(self, text: str) -> bool:
        return text in self.output

    def send(self, number: int) -> None:
        self.signals.append(number)
        self.process.send_signal(number)

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def lines(self) -> list[dict[str, Any]]:
        """All log lines, except an incomplete last line of a killed process."""
        return parse_lines(self.output)

    def describe(self) -> str:
        return f"{self.stage} on node {self.node}, {self.log}"


@dataclass
class Pod:
    """A node and its current process.

    Attributes:
        process: The current process; None before it is started.
        attempts: Number of pods of this node so far.
        stage: Number of the stage.
        start_at: When to start the next process.
        is_done: Whether the node completed its last stage.
    """

    process: NodeProcess | None = None
    attempts: int = 0
    stage: int = 0
    start_at: float = 0.0
    is_done: bool = False


def free_ports(count: int) -> list[int]:
    """Find free ports that no outgoing connection takes."""
    found: list[int] = []
    while len(found) < count:
        port = random.SystemRandom().choice(PORTS)
        with socket.socket() as sock, suppress(OSError):
            sock.bind(("127.0.0.1", port))
            if port not in found:
                found.append(port)
    return found
