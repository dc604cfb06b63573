"""What may run on one node alone when several train together: the table in docs/scaling.md, with real processes."""

import os
import queue
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.nodes.single_node_operations import OPERATIONS, Verdict, table
from tests.preloaded_python import PreloadedPython

REPOSITORY = Path(__file__).parents[2]
COMMAND = "from tests.nodes.single_node_operations import main; main()"
COLLECTIVE = "`strategy.reduce` of values of replicas"

# An operation that waits for another node never ends alone. This time only has to be longer than the operation itself.
HANG_SECONDS = 0.4
LIMIT_SECONDS = 120.0


class NodeProcess:
    """A node that runs operations by their names."""

    def __init__(self, python: PreloadedPython, index: int, addresses: list[str], directory: Path) -> None:
        pipe = directory / f"operations-{index}"
        os.mkfifo(pipe)
        self._log = directory / f"log-{index}"
        output, write_end = os.pipe()
        with self._log.open("w") as log, os.fdopen(write_end, "w") as stdout:
            arguments = ["-c", COMMAND, pipe, str(index), *addresses]
            self._process = python.start(arguments, stdout=stdout, stderr=log)
        self._operations = pipe.open("w")
        self._lines: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read, args=(output,))
        self._reader.start()
        self.hash = ""

    def _read(self, output: int) -> None:
        with os.fdopen(output) as lines:
            for line in lines:
                self._lines.put(line.strip())

    def wait_until_ready(self) -> None:
        try:
            self.hash, ready = self._lines.get(timeout=LIMIT_SECONDS).split()
        except queue.Empty:
            pytest.fail(f"the process did not start: {self._log.read_text()[-2000:]}")
        assert ready == "ready"

    def start(self, name: str) -> None:
        self._operations.write(f"{name}\n")
        self._operations.flush()

    def outcome(self, timeout: float) -> str:
        """Return `ended` or the error of the operation, or `hangs` if there is none in this time."""
        try:
            self.hash, outcome = self._lines.get(timeout=timeout).split(maxsplit=1)
        except queue.Empty:
            return "hangs"
        return outcome

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._reader.join()
        self._operations.close()


def free_addresses() -> list[str]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    addresses = [f"127.0.0.1:{one.getsockname()[1]}" for one in sockets]
    for one in sockets:
        one.close()
    return addresses


def run_on_both(nodes: list[NodeProcess], name: str) -> list[str]:
    for node in nodes:
        node.start(name)
    return [node.outcome(LIMIT_SECONDS) for node in nodes]


def verdict(alone: NodeProcess, other: NodeProcess, name: str) -> Verdict | str:
    """Run an operation on one node and find out what happens."""
    is_expected_to_end = OPERATIONS[name].verdict in {Verdict.SAFE, Verdict.LOCAL}
    before = alone.hash
    alone.start(name)
    outcome = alone.outcome(LIMIT_SECONDS if is_expected_to_end else HANG_SECONDS)
    if outcome == "ended":
        # The nodes must still agree on the order of their collectives.
        outcomes = run_on_both([alone, other], COLLECTIVE)
        if outcomes != ["ended", "ended"]:
            return f"ended, then the nodes could not reduce a value: {outcomes}"
        return Verdict.SAFE if alone.hash == before else Verdict.LOCAL
    if outcome != "hangs":
        return outcome
    other.start(name)
    outcomes = [other.outcome(LIMIT_SECONDS)]
    # If it fails, it may leave the first node waiting.
    outcomes.append(alone.outcome(LIMIT_SECONDS if outcomes == ["ended"] else HANG_SECONDS))
    if outcomes == ["ended", "ended"]:
        return Verdict.HANGS
    return Verdict.FAILS if "Error: " in outcomes[0] else f"hangs, then: {outcomes}"


def verdicts(python: PreloadedPython, index: int, directory: Path) -> dict[str, Verdict | str]:
    """Run all operations on one of two nodes alone, in new processes."""
    addresses = free_addresses()
    nodes = [NodeProcess(python, i, addresses, directory) for i in range(2)]
    try:
        for node in nodes:
            node.wait_until_ready()
        return {name: verdict(nodes[index], nodes[1 - index], name) for name in OPERATIONS}
    finally:
        for node in nodes:
            node.kill()


@pytest.fixture(scope="module")
def verdicts_of_nodes(
    preloaded_python: PreloadedPython, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[Future[dict[str, Verdict | str]]]]:
    """The verdicts on node 0 alone and on node 1 alone, which are measured at the same time."""
    directories = [tmp_path_factory.mktemp(f"alone-{index}") for index in range(2)]
    with ThreadPoolExecutor(2) as executor:
        yield [
            executor.submit(verdicts, preloaded_python, index, directory) for index, directory in enumerate(directories)
        ]


@pytest.mark.parametrize("index", [0, 1], ids=["chief", "other"])
def test_operations_on_one_node_alone_do_what_the_documentation_says(verdicts_of_nodes, index):
    expected = {name: operation.verdict for name, operation in OPERATIONS.items()}

    assert verdicts_of_nodes[index].result() == expected


def test_documentation_lists_all_operations():
    assert table() in (REPOSITORY / "docs" / "scaling.md").read_text()
