"""The command `topwork` as a user runs it: a process of its own, an embedded S3 below a state folder."""

import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ruamel.yaml import YAML

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
            timeout=300,
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

    def wait_for(self, text: str, seconds: float = 180) -> None:
        deadline = time.monotonic() + seconds
        while text not in self.output:
            assert time.monotonic() < deadline, self.output
            assert self.process.poll() is None, self.output
            time.sleep(0.1)

    def stop(self, number: int) -> int:
        self.process.send_signal(number)
        return self.process.wait(timeout=60)


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
