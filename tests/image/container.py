"""A container under podman: followed while it runs, stopped as the kubelet would, and told how it ended."""

import json
import subprocess
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.image.engine import podman

from topwork.cluster.termination_message import TerminationMessage, parse_termination_message

# Kubernetes takes as much of the log where a process left no message.
LAST_BYTES = 2048
# Made by podman in every container; Kubernetes lays its own over them.
PODMANS = {"/etc/hosts", "/etc/hostname", "/etc/resolv.conf", "/etc/mtab", "/run/.containerenv", "/run/secrets"}


@dataclass(frozen=True)
class Ended:
    """How a container ended.

    Attributes:
        exit_code: Exit code of its process.
        message: Its termination message as Kubernetes would keep it.
        log: All that it wrote.
        written: Files that it changed or made outside of its mounts.
    """

    exit_code: int
    message: str
    log: str
    written: list[str]

    @property
    def ending(self) -> TerminationMessage | None:
        """The termination message, if topwork wrote it."""
        return parse_termination_message(self.message)

    def lines(self, message: str, **facts: Any) -> list[dict[str, Any]]:
        """Find the lines of the log with a message and some facts."""
        found = [json.loads(line) for line in self.log.splitlines() if line.startswith("{")]
        return [line for line in found if line.items() >= {"message": message, **facts}.items()]


class Container:
    """A container that was started."""

    def __init__(
        self,
        *,
        name: str,
        command: list[str],
        variables: dict[str, str],
        message: Path,
        falls_back_to_log: bool,
        mounts: list[str],
        port: int,
    ) -> None:
        self.port = port
        self._name = name
        self._message = message
        self._falls_back_to_log = falls_back_to_log
        self._mounts = mounts
        podman("run", "--detach", "--name", name, *command, **variables)

    @property
    def log(self) -> str:
        """All that it has written until now."""
        ended = subprocess.run(
            ["podman", "logs", self._name], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True
        )
        return ended.stdout

    @property
    def is_running(self) -> bool:
        """Whether its process is there."""
        return self._inspect("{{.State.Running}}") == "true"

    def until(self, holds: Callable[[str], bool], seconds: float = 600) -> None:
        """Wait until its log is as it should be."""
        deadline = time.monotonic() + seconds
        while not holds(log := self.log):
            assert self.is_running, log
            assert time.monotonic() < deadline, log
            time.sleep(0.2)

    def until_metrics(self, series: str, at_least: float = 1, seconds: float = 600) -> None:
        """Scrape the port that the pod declares until a series has a value."""
        deadline = time.monotonic() + seconds
        while self._value(series) < at_least:
            assert self.is_running, self.log
            assert time.monotonic() < deadline, self.log
            time.sleep(0.2)

    def _value(self, series: str) -> float:
        name, _, labels = series.rstrip("}").partition("{")
        with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=10) as answer:
            for line in answer.read().decode().splitlines():
                # Beside those of the job, which every series carries.
                if line.startswith(f"{name}{{") and labels in line:
                    return float(line.rpartition(" ")[2])
        return 0

    def process(self, number: int) -> list[str]:
        """Command line of a process, by its number in the container."""
        command = podman("exec", self._name, "cat", f"/proc/{number}/cmdline").stdout
        return command.rstrip("\0").split("\0")

    def owners(self) -> set[str]:
        """Users of all its processes."""
        listed = podman("exec", self._name, "sh", "-c", "stat --format %u /proc/[0-9]* 2>/dev/null || true")
        return set(listed.stdout.split())

    def stop(self) -> Ended:
        """Send SIGTERM, and SIGKILL when the grace period is over."""
        podman("stop", self._name, seconds=900)
        return self.wait()

    def wait(self, seconds: float = 900) -> Ended:
        """Wait for its end."""
        code = int(podman("wait", self._name, seconds=seconds).stdout)
        log = self.log
        message = self._message.read_text()
        if not message and self._falls_back_to_log and code:
            message = log[-LAST_BYTES:]
        ended = Ended(code, message, log, self._written())
        self.remove()
        return ended

    def remove(self) -> None:
        """Take it away, whether or not it still runs."""
        podman("rm", "--force", "--time", "0", "--ignore", self._name)

    def _written(self) -> list[str]:
        changes = json.loads(podman("diff", "--format", "json", self._name).stdout)
        paths = [path for paths in changes.values() for path in paths or ()]
        # A mount point is made in the container's own layer, and so are the folders on the way to it.
        made = {str(parent) for mount in (*self._mounts, *PODMANS) for parent in (Path(mount), *Path(mount).parents)}
        return sorted(set(paths) - made)

    def _inspect(self, template: str) -> str:
        return podman("container", "inspect", "--format", template, self._name).stdout.strip()
