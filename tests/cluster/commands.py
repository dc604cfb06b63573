"""The `topwork` command as a separate process, run to completion or in the background."""

import os
import signal
import subprocess
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from tests.cluster.environment import RUN_SECONDS, executable

LAST_CHARACTERS = 8000


@dataclass(frozen=True)
class CommandResult:
    """The result of a command."""

    exit_code: int
    stdout: str
    stderr: str

    @property
    def output(self) -> str:
        """Standard output and standard error."""
        return self.stdout + self.stderr


class RunningCommand:
    """A command that runs in the background."""

    def __init__(self, arguments: list[str], environment: Mapping[str, str], directory: Path) -> None:
        self.arguments = arguments
        name = uuid.uuid4().hex[:8]
        self._stdout, self._stderr = directory / f"{name}.out", directory / f"{name}.err"
        with self._stdout.open("w") as out, self._stderr.open("w") as err:
            self.process = subprocess.Popen(
                [executable("topwork"), *arguments],
                env=environment,
                cwd=directory,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
            )

    @property
    def output(self) -> str:
        """Standard output and standard error so far."""
        return self._stdout.read_text() + self._stderr.read_text()

    def wait_for(self, *texts: str, seconds: float) -> None:
        """Wait until the output contains all of these texts."""
        deadline = time.monotonic() + seconds
        while missing := [text for text in texts if text not in self.output]:
            has_exited = self.process.poll() is not None
            if has_exited and not [text for text in texts if text not in self.output]:
                return
            if has_exited or time.monotonic() > deadline:
                state = (
                    f"exited with {self.process.returncode}"
                    if has_exited
                    else f"still runs after {seconds:.0f} seconds"
                )
                pytest.fail(f"{self} {state} and did not print {missing}. Output:\n{self.output[-LAST_CHARACTERS:]}")
            time.sleep(0.2)

    def wait(self, *, seconds: float) -> CommandResult:
        """Wait until the command exits."""
        try:
            code = self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            output = self.output[-LAST_CHARACTERS:]
            self.kill()
            pytest.fail(f"{self} still runs after {seconds:.0f} seconds. Output:\n{output}")
        return CommandResult(code, self._stdout.read_text(), self._stderr.read_text())

    def interrupt(self, *, seconds: float = 60) -> CommandResult:
        """Interrupt the command, as Ctrl-C does."""
        self.process.send_signal(signal.SIGINT)
        return self.wait(seconds=seconds)

    def kill(self) -> None:
        """Kill the command."""
        self.process.kill()
        self.process.wait()

    def __str__(self) -> str:
        return f"topwork {' '.join(self.arguments)}"


@dataclass
class Topwork:
    """Runs `topwork` commands in a namespace.

    Attributes:
        namespace: Namespace of the cluster.
        directory: Working directory, which also stores the output.
        variables: Additional environment variables.
        started: Commands that were started, some of which may still be running.
    """

    namespace: str
    directory: Path
    variables: Mapping[str, str] = field(default_factory=dict)
    started: list[RunningCommand] = field(default_factory=list)

    def start(self, *arguments: str | Path, namespace: str | None = None, **variables: str) -> RunningCommand:
        """Start a command that uses the cluster, in the background. Without `--as`, `submit` creates plain Jobs."""
        options = ["--namespace", namespace or self.namespace]
        if arguments[0] == "submit" and "--as" not in arguments:
            # Whether or not the cluster serves TransferJobs.
            options += ["--as", "job"]
        return self._start([*map(str, arguments), *options], variables)

    def __call__(
        self, *arguments: str | Path, namespace: str | None = None, seconds: float = RUN_SECONDS, **variables: str
    ) -> CommandResult:
        """Run a command that uses the cluster."""
        return self.start(*arguments, namespace=namespace, **variables).wait(seconds=seconds)

    def run_locally(self, *arguments: str | Path, seconds: float = RUN_SECONDS, **variables: str) -> CommandResult:
        """Run a command that requires no cluster."""
        return self._start([str(argument) for argument in arguments], variables).wait(seconds=seconds)

    def _start(self, arguments: list[str], variables: Mapping[str, str]) -> RunningCommand:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "TOPWORK_"))}
        # Wide enough to avoid line wrapping.
        environment = inherited | {"NO_COLOR": "1", "COLUMNS": "400"} | dict(self.variables) | dict(variables)
        self.started.append(RunningCommand(arguments, environment, self.directory))
        return self.started[-1]

    def stop_all(self) -> None:
        """Kill all commands that are still running."""
        for command in self.started:
            if command.process.poll() is None:
                command.kill()
