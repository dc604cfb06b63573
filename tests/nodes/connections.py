"""Nodes in threads and processes of this machine, for tests of the rendezvous and the connected group."""

import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from topwork.cancellation import StopRequest
from topwork.nodes.group import NodeGroup
from topwork.nodes.node import Node
from topwork.nodes.rendezvous import join

TIMEOUT_SECONDS = 60.0
"""Longest time that a test waits for something that takes well under a second on an idle machine."""

SCRIPT = """
import sys
from topwork.cancellation import StopRequest
from topwork.cli.runtime.logging import configure_logging
from topwork.errors import TopworkError
from topwork.nodes import connection
from topwork.nodes.node import Node
from topwork.nodes.rendezvous import join

configure_logging()
connection.HEARTBEAT_SECONDS = 0.5
index, count, coordinator = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
node = Node(index, ("127.0.0.1:1",) * count, coordinator, 120.0)
try:
    nodes = join(node, {{"process": index}}, is_complete=lambda: False, stop=StopRequest())
    print("joined", flush=True)
    {statements}
except TopworkError as error:
    print(f"{{type(error).__name__}}: {{error}}", flush=True)
    sys.exit(error.exit_code)
"""


def free_address(host: str = "127.0.0.1") -> str:
    """Return an address of this machine at which nothing listens."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as sock:
        sock.bind((host, 0))
        port = sock.getsockname()[1]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def start_thread(function: Callable[[], Any]) -> "Future[Any]":
    """Run a function in a daemon thread, which a failed test does not wait for."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def start_join(
    index: int,
    count: int,
    coordinator: str,
    *,
    is_complete: Callable[[], bool] = lambda: False,
    stop: StopRequest | None = None,
    identity: Mapping[str, str] | None = None,
    timeout: float = TIMEOUT_SECONDS,
) -> "Future[NodeGroup | None]":
    """Let a node join in a thread. Its facts are its index."""
    node = Node(index, ("127.0.0.1:1",) * count, coordinator, timeout)
    return start_thread(
        lambda: join(node, {"thread": index}, is_complete=is_complete, stop=stop or StopRequest(), identity=identity)
    )


def on_all(groups: Sequence[NodeGroup], function: Callable[[NodeGroup], Any]) -> list[Any]:
    """Call a function for every node at the same time, and return the results in the order of the nodes."""
    futures = [start_thread(lambda group=group: function(group)) for group in groups]
    return [future.result(TIMEOUT_SECONDS) for future in futures]


class NodeProcess:
    """A node in a process of its own."""

    def __init__(self, index: int, count: int, coordinator: str, statements: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT.format(statements=statements), str(index), str(count), coordinator],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def __enter__(self) -> "NodeProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def read_line(self) -> str:
        """Wait for the next line of its output."""
        assert self._process.stdout
        return self._process.stdout.readline().rstrip()

    def send_signal(self, number: int) -> None:
        """Send a signal to the process."""
        self._process.send_signal(number)

    def wait(self) -> int:
        """Wait for the end of the process, and return its exit code."""
        return self._process.wait(TIMEOUT_SECONDS)
