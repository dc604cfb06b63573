"""Nodes of `topwork run --nodes`: processes of this machine that run the stages as the pods of a cluster do."""

import json
import logging
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING

import structlog

from topwork.cancellation import STOPPED_MESSAGE, StopInterrupt
from topwork.cli.runtime.environment import has_storage_configuration, local_node_environment, user_environment
from topwork.cli.runtime.logging import is_verbose
from topwork.clients.prometheus.gpus import list_gpus
from topwork.cluster.names import StageName
from topwork.cluster.termination_message import TerminationMessage, parse_termination_message
from topwork.errors import (
    GateError,
    SettingError,
    SpecError,
    Stopped,
    TopworkError,
    UnavailableError,
    limit_message,
)
from topwork.local.server import embedded_storage
from topwork.nodes.node import Node
from topwork.redaction import redact
from topwork.spec.yaml_output import dump_job

if TYPE_CHECKING:
    from topwork.clients.s3.storage import StorageSettings
    from topwork.spec import TransferJob

log = structlog.get_logger(__name__)

TRAINING_STAGES: tuple[StageName, ...] = ("transfer", "fine-tune")
# The processes must not outlive the one that shows their progress.
COMMAND = (
    "from topwork.local.supervisor import die_with_parent; die_with_parent(); from topwork.cli import main; main()"
)
PEER_TIMEOUT_SECONDS = 300.0
POLL_SECONDS = 0.1
FOLLOW_SECONDS = 10.0
"""Time for the other nodes to end by themselves after one has failed."""
STOP_SECONDS = 30.0
"""Time for a node to end after SIGTERM when another one has failed."""
RELAY_SECONDS = 5.0
"""Time to log the last lines of nodes that have ended, such as the traceback of a bug."""
ABOUT_ANOTHER_NODE = re.compile(r"(Lost node|Node) \d+\b")
"""Beginning of the error of a node that only follows another one; see `topwork.nodes.failure`."""


class NodeError(TopworkError):
    """The error that ended a node, with its exit code."""

    def __init__(self, text: str, exit_code: int) -> None:
        super().__init__(text)
        self.exit_code = exit_code


@dataclass(frozen=True)
class LocalNodes:
    """Nodes on this machine.

    Attributes:
        count: Number of nodes.
        state: State directory, which the embedded storage uses.
        gpus: The GPUs of each node, in the format of CUDA_VISIBLE_DEVICES; None without GPUs.
        environment: Variables that each node inherits: those of the user. Importing TensorFlow sets others here.
    """

    count: int
    state: Path
    gpus: tuple[str, ...] | None
    environment: Mapping[str, str] = field(default_factory=user_environment, repr=False, compare=False)

    @property
    def overrides(self) -> list[str]:
        """The nodes and GPUs of this machine, as overrides of a spec, whose rules depend on them."""
        gpus = len(self.gpus[0].split(",")) if self.gpus else 0
        return [f"spec.compute.nodes={self.count}", f"spec.compute.gpus={gpus}"]

    def train(self, job: "TransferJob", dataset: str, scratch: Path) -> None:
        """Run the training stages of a job, and publish.

        Args:
            job: The job, with the `overrides`.
            dataset: Key prefix of its stored dataset.
            scratch: Directory of the run, in which each node has one of its own.

        Raises:
            TopworkError: If a node failed, with its message and exit code.
            Stopped: If a stop was requested, or a node was stopped.
        """
        scratch = scratch.absolute()
        file = scratch / "job.yaml"
        file.write_text(dump_job(job), "utf-8")
        with ExitStack() as stack:
            storage = None if has_storage_configuration() else stack.enter_context(embedded_storage(self.state))
            for stage in TRAINING_STAGES:
                _Stage(self, stage, job.run, dataset, file, storage).run()


def open_local_nodes(count: int, replicas: int | None, state: Path, visible_devices: str | None) -> LocalNodes:
    """Divide this machine among several nodes.

    Args:
        count: Number of nodes, at least two.
        replicas: `--replicas`.
        state: State directory.
        visible_devices: CUDA_VISIBLE_DEVICES; None if it is not set.

    Raises:
        SettingError: If replicas are requested, or the number of GPUs is not a multiple of the number of nodes.
    """
    if replicas is not None:
        raise SettingError(
            "--replicas cannot be combined with --nodes: each node trains one replica per GPU, or one on the CPU. Use "
            "more nodes instead."
        )
    gpus = list_gpus(visible_devices)
    if len(gpus) % count:
        raise SettingError(
            f"--nodes {count} cannot divide {len(gpus)} GPUs: each node needs the same number. Select GPUs with "
            "CUDA_VISIBLE_DEVICES, or hide them with CUDA_VISIBLE_DEVICES=-1."
        )
    share = len(gpus) // count
    divided = tuple(",".join(gpus[index * share : (index + 1) * share]) for index in range(count))
    return LocalNodes(count, state, divided if share else None)


@dataclass(frozen=True)
class _Ended:
    """A node that has ended.

    Attributes:
        index: Index of the node.
        code: Its exit code; negative if a signal killed it.
        message: Its termination message; None if it wrote none.
        did_not_end: Whether this command killed it, because it did not end by itself after another one had failed.
    """

    index: int
    code: int
    message: TerminationMessage | None
    did_not_end: bool = False

    @property
    def is_cause(self) -> bool:
        """Whether it failed by itself, and not because another node did."""
        text = self.message.error if self.message else None
        is_failure = self.code not in {0, Stopped.exit_code} and not self.did_not_end
        return is_failure and not ABOUT_ANOTHER_NODE.match(text or "")

    def error(self) -> TopworkError:
        if self.code == Stopped.exit_code:
            return Stopped(STOPPED_MESSAGE)
        if self.code < 0:
            name = signal.Signals(-self.code).name
            return UnavailableError(
                f"Node {self.index} was killed by {name}. Check whether the memory of this machine is exhausted, and "
                "start the same job again to resume."
            )
        text = self.message.error if self.message else None
        # A wrong spec or a missed gate concerns the run, not the node.
        if text and (self.code in {SpecError.exit_code, GateError.exit_code} or ABOUT_ANOTHER_NODE.match(text)):
            return NodeError(text, self.code)
        return NodeError(f"Node {self.index} failed: {text or f'exit code {self.code}'}", self.code)


def choose_error(ended: Sequence[_Ended]) -> TopworkError | None:
    """Return the error of the command: that of the node that failed by itself, if one did.

    Args:
        ended: All nodes, in the order in which they ended.
    """
    failed = [node for node in ended if node.code]
    return next((node for node in failed if node.is_cause), failed[0]).error() if failed else None


class _Stage:
    """The processes of a stage, one per node."""

    def __init__(
        self,
        nodes: LocalNodes,
        stage: StageName,
        run: str,
        dataset: str,
        file: Path,
        storage: "StorageSettings | None",
    ) -> None:
        self._nodes, self._stage, self._run, self._dataset = nodes, stage, run, dataset
        self._file, self._storage = file, storage
        self._processes: list[subprocess.Popen[str]] = []
        self._relays: list[threading.Thread] = []

    def run(self) -> None:
        """Run the stage on all nodes.

        Raises:
            TopworkError: If a node failed.
        """
        ports = _free_ports(self._nodes.count + 1)
        addresses = tuple(f"127.0.0.1:{port}" for port in ports[1:])
        node = Node(0, addresses, f"127.0.0.1:{ports[0]}", PEER_TIMEOUT_SECONDS)
        try:
            for index in range(self._nodes.count):
                self._start(replace(node, index=index))
            ended = self._wait()
        except StopInterrupt:
            # Each node finishes its step, and node 0 stores a checkpoint.
            self._signal(signal.SIGTERM)
            self._wait_for_all()
            raise
        finally:
            self._signal(signal.SIGKILL)
            for relay in self._relays:
                relay.join(RELAY_SECONDS)
        if error := choose_error(ended):
            raise error

    def _start(self, node: Node) -> None:
        directory = self._file.parent / f"node-{node.index}"
        directory.mkdir(exist_ok=True)
        self._termination_log(node.index).write_text("")
        arguments = [
            *(["--verbose"] if is_verbose() else []),
            *("stage", self._stage, "--job", str(self._file), "--scratch", str(directory), "--metrics-port", "0"),
            *("--termination-log", str(self._termination_log(node.index))),
        ]
        process = subprocess.Popen(
            [sys.executable, "-c", COMMAND, *arguments],
            env=local_node_environment(
                node,
                run=self._run,
                dataset=self._dataset,
                storage=self._storage,
                gpus=self._nodes.gpus[node.index] if self._nodes.gpus else None,
                environment=self._nodes.environment,
            ),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            # Ctrl-C interrupts this process only, which then stops the nodes.
            start_new_session=True,
        )
        log.info("node started", node=node.index, stage=self._stage, pid=process.pid)
        relay = threading.Thread(target=_relay, args=(node.index, process.stdout), daemon=True)
        relay.start()
        self._processes.append(process)
        self._relays.append(relay)

    def _termination_log(self, index: int) -> Path:
        return self._file.parent / f"node-{index}" / f"termination-{self._stage}.json"

    def _wait(self) -> list[_Ended]:
        """Wait for all nodes, and stop those that do not end by themselves after one has failed."""
        ended: list[_Ended] = []
        failed_at: float | None = None
        signals = [(FOLLOW_SECONDS, signal.SIGTERM), (FOLLOW_SECONDS + STOP_SECONDS, signal.SIGKILL)]
        while len(ended) < len(self._processes):
            for index, process in enumerate(self._processes):
                if process.poll() is not None and index not in {node.index for node in ended}:
                    ended.append(_Ended(index, process.returncode, self._read_message(index), did_not_end=not signals))
                    if process.returncode and failed_at is None:
                        failed_at = time.monotonic()
            if failed_at is not None and signals and time.monotonic() > failed_at + signals[0][0]:
                self._signal(signals.pop(0)[1])
            time.sleep(POLL_SECONDS)
        return ended

    def _wait_for_all(self) -> None:
        for process in self._processes:
            process.wait()

    def _read_message(self, index: int) -> TerminationMessage | None:
        return parse_termination_message(self._termination_log(index).read_text("utf-8"))

    def _signal(self, number: signal.Signals) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(number)


def _free_ports(count: int) -> list[int]:
    """Return ports of the loopback interface that are free now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for bound in sockets:
            bound.bind(("127.0.0.1", 0))
        return [bound.getsockname()[1] for bound in sockets]


def _relay(index: int, stream: IO[str]) -> None:
    """Log the lines of a node with its index."""
    with stream:
        for line in stream:
            fields = _parse_line(line)
            if fields is None:
                print(limit_message(redact(f"[node {index}] {line.rstrip()}")), file=sys.stderr, flush=True)
                continue
            level = logging.getLevelNamesMapping().get(str(fields.pop("level")).upper(), logging.INFO)
            message = str(fields.pop("message"))
            if traceback := fields.pop("traceback", None):
                fields["exception"] = traceback
            log.log(level, message, **{**fields, "node": index})


def _parse_line(line: str) -> dict[str, object] | None:
    try:
        fields = json.loads(line)
    except ValueError:
        return None
    if not isinstance(fields, dict) or not {"level", "message"} <= fields.keys():
        return None
    return {name: value for name, value in fields.items() if name not in {"time", "event", "logger"}}
