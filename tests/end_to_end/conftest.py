"""The command `topwork` as a user or a pod runs it: a process of its own, with an embedded or a real S3."""

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
from tests.end_to_end.seeds import STORAGE, Seeds

from topwork.clients.s3.storage import Storage, StorageSettings, create_bucket
from topwork.cluster.termination_message import TerminationMessage
from topwork.spec import TransferJob

Command = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """The environment without any AWS setting, with a home and a state folder of its own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "TOPWORK_"))}
    return kept | {"HOME": str(tmp_path / "home"), "TOPWORK_STATE": str(tmp_path / "state"), "NO_COLOR": "1"}


@pytest.fixture
def topwork(environment: dict[str, str], tmp_path: Path) -> Command:
    """Run `topwork` with arguments, in the test's folder."""

    def call(*arguments: str | Path, **variables: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-m", "topwork", *map(str, arguments)],
            env=environment | variables,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )

    return call


class Running:
    """A `topwork` that was started and not waited for; all it says goes to one file."""

    def __init__(self, arguments: tuple[str | Path, ...], environment: dict[str, str], folder: Path) -> None:
        self._log = folder / f"{uuid.uuid4().hex[:8]}.log"
        with self._log.open("w") as log:
            command = [sys.executable, "-m", "topwork", *map(str, arguments)]
            self.process = subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log)

    @property
    def output(self) -> str:
        return self._log.read_text()

    def wait_for(self, text: str, seconds: float = 600) -> None:
        deadline = time.monotonic() + seconds
        while text not in self.output:
            assert time.monotonic() < deadline, self.output
            assert self.process.poll() is None, self.output
            time.sleep(0.1)

    def stop(self, number: int) -> int:
        self.process.send_signal(number)
        return self.process.wait(timeout=180)


@pytest.fixture
def start(environment: dict[str, str], tmp_path: Path) -> Iterator[Callable[..., Running]]:
    """Start `topwork` with arguments, in the test's folder; what still runs at the end is killed."""
    started: list[Running] = []

    def call(*arguments: str | Path) -> Running:
        started.append(Running(arguments, environment, tmp_path))
        return started[-1]

    yield call
    for running in started:
        running.process.kill()
        running.process.wait()


@pytest.fixture
def job_file(make_job: Callable[..., TransferJob], tmp_path: Path) -> Callable[..., Path]:
    """Write a tiny job for the embedded storage; keyword arguments replace whole keys of `spec`."""

    def write(name: str = "job.yaml", **overrides: object) -> Path:
        job = make_job(storage="s3://photos/topwork", **overrides)
        content = job.model_dump(mode="json", by_alias=True, exclude_unset=True)
        with (tmp_path / name).open("w") as file:
            YAML().dump(content, file)
        return tmp_path / name

    return write


class Container:
    """A container's process."""

    def __init__(self, arguments: list[str], environment: dict[str, str], folder: Path, ending: Path) -> None:
        self._log = folder / f"{time.monotonic_ns()}.log"
        self._ending = ending
        with self._log.open("w") as log:
            command = [sys.executable, "-m", "topwork", "stage", *arguments]
            self.process = subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log)

    @property
    def output(self) -> str:
        return self._log.read_text()

    @property
    def lines(self) -> list[dict[str, Any]]:
        """All lines; one that is no JSON fails the test."""
        return [json.loads(line) for line in self.output.splitlines()]

    @property
    def messages(self) -> list[str]:
        return [line["message"] for line in self.lines]

    def fact(self, message: str, name: str) -> Any:
        return next(line[name] for line in self.lines if line["message"] == message)

    def wait_for(self, seen: Callable[[], bool], seconds: float = 600) -> None:
        deadline = time.monotonic() + seconds
        while not seen():
            assert time.monotonic() < deadline, self.output
            assert self.process.poll() is None, self.output
            time.sleep(0.02)

    def wait_for_line(self, text: str) -> None:
        self.wait_for(lambda: text in self.output)

    def end(self, seconds: float = 600) -> tuple[int, TerminationMessage]:
        code = self.process.wait(timeout=seconds)
        return code, TerminationMessage.model_validate_json(self._ending.read_text())

    def stop(self, seconds: float) -> tuple[int, TerminationMessage]:
        self.process.send_signal(signal.SIGTERM)
        return self.end(seconds)


class Pod:
    """Volumes and variables that the containers of a pod share."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.scratch = folder / "scratch"
        self.variables = environment
        self.folder = folder / "empty"
        self.folder.mkdir()
        self._ending = folder / "termination-log"
        self.started: list[Container] = []

    def start(self, stage: str, job: Path, **variables: str | None) -> Container:
        self._ending.write_text("")
        changed = {**self.variables, **variables}
        environment = {name: value for name, value in changed.items() if value is not None}
        arguments = [stage, "--job", job, "--scratch", self.scratch, "--metrics-port", "0"]
        arguments += ["--termination-log", self._ending]
        self.started.append(Container([*map(str, arguments)], environment, self.folder, self._ending))
        return self.started[-1]

    def run(self, stage: str, job: Path, **variables: str | None) -> tuple[int, TerminationMessage, Container]:
        process = self.start(stage, job, **variables)
        return *process.end(), process


@pytest.fixture
def pod(environment, s3_settings, tmp_path) -> Iterator[Pod]:
    """A pod with the variables of the Secret topwork-s3."""
    secret = {
        "AWS_ENDPOINT_URL": s3_settings.endpoint_url,
        "AWS_ACCESS_KEY_ID": s3_settings.access_key,
        "AWS_SECRET_ACCESS_KEY": s3_settings.secret_key,
    }
    pod = Pod(tmp_path, environment | secret | {"AWS_EC2_METADATA_DISABLED": "true"})
    yield pod
    for process in pod.started:
        process.process.kill()
        process.process.wait()


@pytest.fixture
def write(make_job, tmp_path) -> Callable[..., Path]:
    """Write a tiny job for the storage of the test; keyword arguments replace whole keys of `spec`."""

    def write_job(**overrides: object) -> Path:
        path = tmp_path / "job.yaml"
        path.write_text(make_job(**overrides).model_dump_json(by_alias=True, exclude_unset=True))
        return path

    return write_job


@pytest.fixture
def proxy(s3_settings) -> Callable[..., AbstractContextManager[int]]:
    """Forward a port to the S3 server.

    Over TLS if a context is given; a silent one never answers; with `stall` it falls silent when a client sends that.
    """

    @contextmanager
    def serve(*, tls: ssl.SSLContext | None = None, silent: bool = False, stall: bytes | None = None) -> Iterator[int]:
        ended = threading.Event()
        target = s3_settings.endpoint_url.removeprefix("http://").split(":")

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                with suppress(OSError):
                    if silent:
                        ended.wait()
                    elif tls:
                        with tls.wrap_socket(self.request.dup(), server_side=True) as client:
                            forward(client, target)
                    else:
                        forward(self.request, target, stall, ended)

        with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            yield server.server_address[1]
            ended.set()
            server.shutdown()

    return serve


def forward(
    client: socket.socket, target: list[str], stall: bytes | None = None, ended: threading.Event | None = None
) -> None:
    """Carry bytes both ways until either side has closed."""
    with socket.create_connection((target[0], int(target[1]))) as server:
        other = {client: server, server: client}
        while True:
            decrypted = isinstance(client, ssl.SSLSocket) and client.pending()
            for source in [client] if decrypted else select.select([client, server], [], [])[0]:
                if not (data := source.recv(65536)):
                    return
                if stall and ended and source is client and stall in data:
                    ended.wait()
                other[source].sendall(data)


@pytest.fixture(scope="session")
def seeds(tmp_path_factory: pytest.TempPathFactory, s3_settings: StorageSettings) -> Seeds:
    """A machine of its own for the fourteen systems, with the storage that the examples name."""
    folder = tmp_path_factory.mktemp("seeds")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "TOPWORK_"))}
    variables = {
        "HOME": str(folder / "home"),
        "TOPWORK_STATE": str(folder / "state"),
        "NO_COLOR": "1",
        "AWS_ENDPOINT_URL": s3_settings.endpoint_url or "",
        "AWS_ACCESS_KEY_ID": s3_settings.access_key or "",
        "AWS_SECRET_ACCESS_KEY": s3_settings.secret_key or "",
        "AWS_REGION": "us-east-1",
    }
    create_bucket(s3_settings, "ml-artifacts")
    return Seeds(folder, kept | variables, Storage(STORAGE, s3_settings))
