"""Nodes of a run as processes of this machine, each with its own TensorFlow, connected over loopback."""

import json
import os
import socket
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from tests.preloaded_python import PreloadedProcess, PreloadedPython

from topwork.clients.s3.storage import StorageSettings
from topwork.spec import TransferJob

TIMEOUT_SECONDS = 300.0
"""Longest time that a test waits for a process that takes some seconds on an idle machine."""

COMMAND = "from tests.nodes.train_node import main; main()"
TIMES = frozenset({"seconds", "images_per_second", "input_wait_seconds"})


@dataclass(frozen=True)
class Trained:
    """What a node has trained.

    Attributes:
        history: Rows of all epochs, without their durations.
        weights: Weights of the classifier.
    """

    history: list[dict[str, Any]]
    weights: list[np.ndarray]


@dataclass
class RunningNode:
    """A process that trains as one node.

    Attributes:
        process: The process.
        scratch: Its scratch directory.
        output: Its log, one JSON object per line.
        errors: Its standard error.
    """

    process: PreloadedProcess
    scratch: Path
    output: IO[bytes]
    errors: IO[bytes]

    def wait(self) -> int:
        """Wait for the process, and return its exit code."""
        return self.process.wait(TIMEOUT_SECONDS)

    def events(self) -> list[dict[str, Any]]:
        """Return its log up to now."""
        text = Path(self.output.name).read_text()
        return [json.loads(line) for line in text.splitlines() if line.startswith("{")]

    def wait_for_event(self, name: str, **fields: object) -> dict[str, Any]:
        """Wait until it has logged an event with these fields."""
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while time.monotonic() < deadline:
            for event in self.events():
                if event["event"] == name and fields.items() <= event.items():
                    return event
            assert self.process.poll() is None, self.error_text()
            time.sleep(0.02)
        raise TimeoutError(f"{name} {fields} is not in {self.events()}")

    def error_text(self) -> str:
        """Return the end of its standard error."""
        return Path(self.errors.name).read_text()[-4000:]

    def read_result(self) -> Trained:
        """Read what it has trained."""
        rows = json.loads((self.scratch / "history.json").read_text())
        history = [{name: value for name, value in row.items() if name not in TIMES} for row in rows]
        with np.load(self.scratch / "weights.npz") as arrays:
            return Trained(history, [arrays[name] for name in arrays.files])


@dataclass
class NodeProcesses:
    """Starts the nodes of runs; each run has its own storage below `uri`.

    Attributes:
        python: Starts the processes.
        settings: Settings of the S3 server.
        uri: Storage of all runs.
    """

    python: PreloadedPython
    settings: StorageSettings
    uri: str
    _stack: ExitStack = field(default_factory=ExitStack)

    def start(
        self, job: TransferJob, nodes: int, replicas: int = 1, run: str = "", step_seconds: float = 0.0
    ) -> list[RunningNode]:
        """Start the nodes of a run.

        Args:
            job: The job, whose dataset is a folder of this machine.
            nodes: Number of nodes.
            replicas: Number of replicas on each of them.
            run: Name of its storage; by default, the numbers of nodes and replicas.
            step_seconds: Additional duration of each step.
        """
        ports = free_ports(nodes + 1)
        configuration = {
            "job": job.model_dump(by_alias=True, mode="json", exclude_unset=True),
            "addresses": [f"127.0.0.1:{port}" for port in ports[:-1]] if nodes > 1 else [],
            "coordinator": f"127.0.0.1:{ports[-1]}" if nodes > 1 else "",
            "replicas": replicas,
            "step_seconds": step_seconds,
            "uri": f"{self.uri}/{run or f'{nodes}x{replicas}'}",
            "s3": [self.settings.endpoint_url, self.settings.access_key, self.settings.secret_key],
        }
        return [self._start_node(configuration, index) for index in range(nodes)]

    def run(self, job: TransferJob, nodes: int, replicas: int = 1, run: str = "") -> list[Trained]:
        """Run a job to its end, and return what each node has trained."""
        running = self.start(job, nodes, replicas, run)
        codes = [node.wait() for node in running]
        assert codes == [0] * nodes, "\n".join(node.error_text() for node in running)
        return [node.read_result() for node in running]

    def _start_node(self, configuration: dict[str, Any], index: int) -> RunningNode:
        scratch = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix=f"node-{index}-")))
        path = scratch / "configuration.json"
        path.write_text(json.dumps({**configuration, "index": index, "scratch": str(scratch)}))
        output, errors = ((scratch / name).open("wb") for name in ("output", "errors"))
        self._stack.enter_context(output)
        self._stack.enter_context(errors)
        process = self.python.start(["-c", COMMAND, path], stdout=output, stderr=errors, env=dict(os.environ))
        self._stack.callback(process.kill)
        return RunningNode(process, scratch, output, errors)

    def close(self) -> None:
        """Kill processes that are still running, and delete their files."""
        self._stack.close()


def free_ports(count: int) -> list[int]:
    """Return ports of this machine that were free a moment ago."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for sock in sockets:
            sock.bind(("127.0.0.1", 0))
        return [sock.getsockname()[1] for sock in sockets]
