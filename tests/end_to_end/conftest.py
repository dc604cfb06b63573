"""Fixtures that run `topwork` in separate processes, like a user or a pod, with embedded or real S3 storage.

Processes are forks of one that has imported TensorFlow; see `tests.preloaded_python`. A test or file that replaces the
fixture `preloaded_python` by None, or a process with a PYTHONPATH of its own, uses new interpreters.
"""

import json
import os
import select
import signal
import socket
import socketserver
import ssl
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML
from tests.end_to_end.example_systems import STORAGE, ExampleRunner
from tests.preloaded_python import PreloadedProcess, PreloadedPython

from topwork.clients.s3.storage import Storage, StorageSettings, create_bucket
from topwork.cluster.termination_message import TerminationMessage
from topwork.spec import TransferJob

Command = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Environment variables without AWS settings, with separate home and state directories."""
    return isolated_environment(tmp_path)


def isolated_environment(directory: Path) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "TOPWORK_"))}
    return inherited | {"HOME": str(directory / "home"), "TOPWORK_STATE": str(directory / "state"), "NO_COLOR": "1"}


def run_topwork(
    arguments: tuple[str | Path, ...], environment: dict[str, str], directory: Path, python: PreloadedPython | None
) -> "subprocess.CompletedProcess[str]":
    command = ["-m", "topwork", *map(str, arguments)]
    if python and python.accepts(environment):
        return python.run(command, env=environment, cwd=directory)
    return subprocess.run(
        [sys.executable, *command],
        env=environment,
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


@pytest.fixture
def topwork(environment: dict[str, str], tmp_path: Path, preloaded_python: PreloadedPython | None) -> Command:
    """Run `topwork` in the directory of the test and wait until it exits."""
    return lambda *arguments, **variables: run_topwork(arguments, environment | variables, tmp_path, preloaded_python)


@pytest.fixture
def topwork_in_new_interpreter(environment: dict[str, str], tmp_path: Path) -> Command:
    """Run `topwork` like a user: the process imports TensorFlow itself."""
    return lambda *arguments, **variables: run_topwork(arguments, environment | variables, tmp_path, None)


class BackgroundProcess:
    """A `topwork` process that runs in the background and writes all output to one file."""

    def __init__(
        self, arguments: list[str], environment: dict[str, str], directory: Path, python: PreloadedPython | None
    ) -> None:
        self._log = directory / f"{uuid.uuid4().hex[:8]}.log"
        self.process: PreloadedProcess | subprocess.Popen[bytes]
        arguments = ["-m", "topwork", *arguments]
        with self._log.open("w") as log:
            settings: dict[str, Any] = {"env": environment, "cwd": directory, "stdout": log, "stderr": log}
            if python and python.accepts(environment):
                self.process = python.start(arguments, **settings)
            else:
                self.process = subprocess.Popen([sys.executable, *arguments], **settings)

    @property
    def output(self) -> str:
        return self._log.read_text()

    def wait_for(self, condition: Callable[[], bool], seconds: float = 600) -> None:
        """Wait until a condition holds; fail if the process exits first."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.output
            assert self.process.poll() is None, self.output
            time.sleep(0.02)

    def wait_for_output(self, text: str) -> None:
        self.wait_for(lambda: text in self.output)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def send_signal(self, number: int) -> int:
        """Send a signal and return the exit code."""
        self.process.send_signal(number)
        return self.process.wait(timeout=180)


@pytest.fixture
def start_topwork(
    environment: dict[str, str], tmp_path: Path, preloaded_python: PreloadedPython | None
) -> Iterator[Callable[..., BackgroundProcess]]:
    """Start `topwork` in the directory of the test; it is killed when the test ends."""
    processes: list[BackgroundProcess] = []

    def start(*arguments: str | Path) -> BackgroundProcess:
        processes.append(BackgroundProcess([*map(str, arguments)], environment, tmp_path, preloaded_python))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()


@pytest.fixture
def write_local_job(make_job: Callable[..., TransferJob], tmp_path: Path) -> Callable[..., Path]:
    """Write a tiny job for the embedded storage; keyword arguments replace whole keys of `spec`."""

    def write(name: str = "job.yaml", **overrides: object) -> Path:
        job = make_job(storage="s3://photos/topwork", **overrides)
        content = job.model_dump(mode="json", by_alias=True, exclude_unset=True)
        with (tmp_path / name).open("w") as file:
            YAML().dump(content, file)
        return tmp_path / name

    return write


class Container(BackgroundProcess):
    """The process of a container: `topwork stage`."""

    def __init__(
        self,
        arguments: list[str],
        environment: dict[str, str],
        directory: Path,
        python: PreloadedPython | None,
        termination_log: Path,
    ) -> None:
        super().__init__(["stage", *arguments], environment, directory, python)
        self._termination_log = termination_log

    @property
    def lines(self) -> list[dict[str, Any]]:
        """All log lines; a line that is not JSON fails the test."""
        return [json.loads(line) for line in self.output.splitlines()]

    @property
    def messages(self) -> list[str]:
        return [line["message"] for line in self.lines]

    def field(self, message: str, name: str) -> Any:
        """Return a field of the first log line with a message."""
        return next(line[name] for line in self.lines if line["message"] == message)

    def wait(self, seconds: float = 600) -> tuple[int, TerminationMessage]:
        """Wait for the exit code and the termination message."""
        code = self.process.wait(timeout=seconds)
        return code, TerminationMessage.model_validate_json(self._termination_log.read_text())

    def stop(self, seconds: float) -> tuple[int, TerminationMessage]:
        """Send SIGTERM and wait for the exit code and the termination message."""
        self.process.send_signal(signal.SIGTERM)
        return self.wait(seconds)


class Pod:
    """Runs containers that share volumes and environment variables."""

    def __init__(self, directory: Path, variables: dict[str, str], python: PreloadedPython | None) -> None:
        self.python = python
        self.scratch = directory / "scratch"
        self.variables = variables
        self.working_directory = directory / "empty"
        self.working_directory.mkdir()
        self.containers: list[Container] = []
        self._termination_log = directory / "termination-log"

    def start(self, stage: str, job: Path, **variables: str | None) -> Container:
        """Start the container of a stage; a variable that is None is not set."""
        self._termination_log.write_text("")
        merged = {**self.variables, **variables}
        environment = {name: value for name, value in merged.items() if value is not None}
        arguments = [stage, "--job", job, "--scratch", self.scratch, "--metrics-port", "0"]
        arguments += ["--termination-log", self._termination_log]
        self.containers.append(
            Container([*map(str, arguments)], environment, self.working_directory, self.python, self._termination_log)
        )
        return self.containers[-1]

    def run(self, stage: str, job: Path, **variables: str | None) -> tuple[int, TerminationMessage, Container]:
        """Run the container of a stage until it exits."""
        container = self.start(stage, job, **variables)
        return *container.wait(), container


@pytest.fixture
def pod(environment, s3_settings, tmp_path, preloaded_python) -> Iterator[Pod]:
    """A pod with the variables of the Secret topwork-s3."""
    secret = {
        "AWS_ENDPOINT_URL": s3_settings.endpoint_url,
        "AWS_ACCESS_KEY_ID": s3_settings.access_key,
        "AWS_SECRET_ACCESS_KEY": s3_settings.secret_key,
    }
    pod = Pod(tmp_path, environment | secret | {"AWS_EC2_METADATA_DISABLED": "true"}, preloaded_python)
    yield pod
    for container in pod.containers:
        container.kill()


@pytest.fixture
def write_job(make_job, tmp_path) -> Callable[..., Path]:
    """Write a tiny job for the storage of the test; keyword arguments replace whole keys of `spec`."""

    def write(**overrides: object) -> Path:
        path = tmp_path / "job.yaml"
        path.write_text(make_job(**overrides).model_dump_json(by_alias=True, exclude_unset=True))
        return path

    return write


@pytest.fixture
def proxy(s3_settings) -> Callable[..., AbstractContextManager[int]]:
    """Forward a local port to the S3 server.

    `tls` serves TLS with a context, `silent` never responds, and `stall` stops responding once a client sends these
    bytes.
    """

    @contextmanager
    def serve(*, tls: ssl.SSLContext | None = None, silent: bool = False, stall: bytes | None = None) -> Iterator[int]:
        closed = threading.Event()
        target = s3_settings.endpoint_url.removeprefix("http://").split(":")

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                with suppress(OSError):
                    if silent:
                        closed.wait()
                    elif tls:
                        with tls.wrap_socket(self.request.dup(), server_side=True) as client:
                            forward(client, target)
                    else:
                        forward(self.request, target, stall, closed)

        with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            yield server.server_address[1]
            closed.set()
            server.shutdown()

    return serve


def forward(
    client: socket.socket, target: list[str], stall: bytes | None = None, closed: threading.Event | None = None
) -> None:
    """Copy bytes in both directions until one side closes the connection."""
    with socket.create_connection((target[0], int(target[1]))) as server:
        peers = {client: server, server: client}
        while True:
            has_decrypted = isinstance(client, ssl.SSLSocket) and client.pending()
            for source in [client] if has_decrypted else select.select([client, server], [], [])[0]:
                if not (data := source.recv(65536)):
                    return
                if stall and closed and source is client and stall in data:
                    closed.wait()
                peers[source].sendall(data)


@pytest.fixture(scope="session")
def examples(
    tmp_path_factory: pytest.TempPathFactory, s3_settings: StorageSettings, preloaded_python: PreloadedPython
) -> ExampleRunner:
    """Runs the examples with the storage that they name."""
    directory = tmp_path_factory.mktemp("examples")
    variables = {
        "AWS_ENDPOINT_URL": s3_settings.endpoint_url or "",
        "AWS_ACCESS_KEY_ID": s3_settings.access_key or "",
        "AWS_SECRET_ACCESS_KEY": s3_settings.secret_key or "",
        "AWS_REGION": "us-east-1",
    }
    create_bucket(s3_settings, "ml-artifacts")
    environment = isolated_environment(directory) | variables
    return ExampleRunner(directory, environment, Storage(STORAGE, s3_settings), preloaded_python)
