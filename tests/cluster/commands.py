"""The command `topwork` as a person calls it: a process of its own, waited for or left running."""

import os
import signal
import subprocess
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from tests.cluster.surroundings import RUN_SECONDS, program

LAST_CHARACTERS = 8000


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def said(self) -> str:
        """All that it wrote."""
        return self.out + self.err


class Running:
    """A command that was started and not waited for."""

    def __init__(self, arguments: list[str], environment: Mapping[str, str], folder: Path) -> None:
        self.arguments = arguments
        name = uuid.uuid4().hex[:8]
        self._out, self._err = folder / f"{name}.out", folder / f"{name}.err"
        with self._out.open("w") as out, self._err.open("w") as err:
            self.process = subprocess.Popen(
                [program("topwork"), *arguments],
                env=environment,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
            )

    @property
    def said(self) -> str:
        """All that it has written so far."""
        return self._out.read_text() + self._err.read_text()

    def wait_for(self, *texts: str, seconds: float) -> None:
        """Wait until it has written all of these texts."""
        deadline = time.monotonic() + seconds
        while missing := [text for text in texts if text not in self.said]:
            ended = self.process.poll() is not None
            if ended and not [text for text in texts if text not in self.said]:
                return
            if ended or time.monotonic() > deadline:
                how = f"ended with {self.process.returncode}" if ended else f"goes on after {seconds:.0f} seconds"
                pytest.fail(f"{self} {how} and did not say {missing}. It said:\n{self.said[-LAST_CHARACTERS:]}")
            time.sleep(0.2)

    def wait(self, *, seconds: float) -> Ended:
        """Wait until it ends."""
        try:
            code = self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            said = self.said[-LAST_CHARACTERS:]
            self.kill()
            pytest.fail(f"{self} goes on after {seconds:.0f} seconds. It said:\n{said}")
        return Ended(code, self._out.read_text(), self._err.read_text())

    def interrupt(self, *, seconds: float = 60) -> Ended:
        """Press Ctrl-C."""
        self.process.send_signal(signal.SIGINT)
        return self.wait(seconds=seconds)

    def kill(self) -> None:
        """End it in any case."""
        self.process.kill()
        self.process.wait()

    def __str__(self) -> str:
        return f"topwork {' '.join(self.arguments)}"


@dataclass
class Topwork:
    """Calls `topwork` against a namespace.

    Attributes:
        namespace: Namespace of the cluster.
        folder: Where it is called, and where what it says is kept.
        variables: Variables of its environment besides those of the tests.
        started: What was started and may still run.
    """

    namespace: str
    folder: Path
    variables: Mapping[str, str] = field(default_factory=dict)
    started: list[Running] = field(default_factory=list)

    def start(self, *arguments: str | Path, namespace: str | None = None, **variables: str) -> Running:
        """Start a command that talks to the cluster, and do not wait for it."""
        where = ["--namespace", namespace or self.namespace]
        return self._start([*map(str, arguments), *where], variables)

    def __call__(
        self, *arguments: str | Path, namespace: str | None = None, seconds: float = RUN_SECONDS, **variables: str
    ) -> Ended:
        """Call a command that talks to the cluster."""
        return self.start(*arguments, namespace=namespace, **variables).wait(seconds=seconds)

    def here(self, *arguments: str | Path, seconds: float = RUN_SECONDS, **variables: str) -> Ended:
        """Call a command that needs no cluster."""
        return self._start([str(argument) for argument in arguments], variables).wait(seconds=seconds)

    def _start(self, arguments: list[str], variables: Mapping[str, str]) -> Running:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "TOPWORK_"))}
        # Wide enough that no sentence is broken where a terminal would end.
        environment = kept | {"NO_COLOR": "1", "COLUMNS": "400"} | dict(self.variables) | dict(variables)
        self.started.append(Running(arguments, environment, self.folder))
        return self.started[-1]

    def stop_all(self) -> None:
        """End what was started and still runs."""
        for running in self.started:
            if running.process.poll() is None:
                running.kill()
