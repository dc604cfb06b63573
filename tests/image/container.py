"""A container under podman: its log, metrics and processes, and how it terminated."""

import json
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.image.podman import run_podman

from topwork.cluster.termination_message import TerminationMessage, parse_termination_message

# Kubernetes uses this much of the end of the log with FallbackToLogsOnError.
LOG_TAIL_BYTES = 2048
# podman creates these in every container; Kubernetes mounts its own.
PODMAN_FILES = {"/etc/hosts", "/etc/hostname", "/etc/resolv.conf", "/etc/mtab", "/run/.containerenv", "/run/secrets"}


@dataclass(frozen=True)
class TerminatedContainer:
    """The state of a terminated container.

    Attributes:
        exit_code: Exit code of its process.
        message: Its termination message, as in the container status of Kubernetes.
        log: Its complete log.
        changed_files: Files outside its mounts that it created or changed.
    """

    exit_code: int
    message: str
    log: str
    changed_files: list[str]

    @property
    def termination_message(self) -> TerminationMessage | None:
        """The parsed termination message; None if topwork did not write it."""
        return parse_termination_message(self.message)

    def lines(self, message: str, **fields: Any) -> list[dict[str, Any]]:
        """Find the log lines with a message and fields."""
        lines = [json.loads(line) for line in self.log.splitlines() if line.startswith("{")]
        return [line for line in lines if line.items() >= {"message": message, **fields}.items()]


class Container:
    """A started container."""

    def __init__(
        self,
        *,
        name: str,
        command: list[str],
        variables: dict[str, str],
        termination_log: Path,
        fallback_to_logs: bool,
        mounts: list[str],
        port: int,
    ) -> None:
        self.port = port
        self._name = name
        self._termination_log = termination_log
        self._fallback_to_logs = fallback_to_logs
        self._mounts = mounts
        run_podman("run", "--detach", "--name", name, *command, **variables)

    @property
    def log(self) -> str:
        """The log so far."""
        logs = subprocess.run(
            ["podman", "logs", self._name], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True
        )
        return logs.stdout

    @property
    def free_disk_share(self) -> float:
        """Free share of the disk with the volumes of its pod."""
        disk = shutil.disk_usage(self._termination_log)
        return disk.free / disk.total

    @property
    def is_running(self) -> bool:
        """Whether the container is running."""
        return self._inspect("{{.State.Running}}") == "true"

    def wait_for_log(self, condition: Callable[[str], bool], seconds: float = 600) -> None:
        """Wait until the log meets a condition."""
        deadline = time.monotonic() + seconds
        while not condition(log := self.log):
            assert self.is_running, log
            assert time.monotonic() < deadline, log
            time.sleep(0.2)

    def wait_for_metric(self, series: str, at_least: float = 1, seconds: float = 600) -> None:
        """Scrape the declared metrics port until a series reaches a value."""
        deadline = time.monotonic() + seconds
        while self._value(series) < at_least:
            assert self.is_running, self.log
            assert time.monotonic() < deadline, self.log
            time.sleep(0.2)

    def _value(self, series: str) -> float:
        name, _, labels = series.rstrip("}").partition("{")
        with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=10) as response:
            for line in response.read().decode().splitlines():
                # Every series also has the labels of the job.
                if line.startswith(f"{name}{{") and labels in line:
                    return float(line.rpartition(" ")[2])
        return 0

    def command_line(self, pid: int) -> list[str]:
        """Return the command line of a process."""
        command = run_podman("exec", self._name, "cat", f"/proc/{pid}/cmdline").stdout
        return command.rstrip("\0").split("\0")

    def user_ids(self) -> set[str]:
        """Return the user IDs of all processes."""
        owners = run_podman("exec", self._name, "sh", "-c", "stat --format %u /proc/[0-9]* 2>/dev/null || true")
        return set(owners.stdout.split())

    def stop(self) -> TerminatedContainer:
        """Send SIGTERM, and SIGKILL after the grace period, as the kubelet does."""
        run_podman("stop", self._name, seconds=900)
        return self.wait()

    def wait(self, seconds: float = 900) -> TerminatedContainer:
        """Wait until the container terminates, and remove it."""
        code = int(run_podman("wait", self._name, seconds=seconds).stdout)
        log = self.log
        message = self._termination_log.read_text()
        if not message and self._fallback_to_logs and code:
            message = log[-LOG_TAIL_BYTES:]
        terminated = TerminatedContainer(code, message, log, self._changed_files())
        self.remove()
        return terminated

    def remove(self) -> None:
        """Remove the container, even if it is still running."""
        run_podman("rm", "--force", "--time", "0", "--ignore", self._name)

    def _changed_files(self) -> list[str]:
        changes = json.loads(run_podman("diff", "--format", "json", self._name).stdout)
        paths = [path for paths in changes.values() for path in paths or ()]
        # podman creates mount points and their parent directories in the layer of the container.
        created = {
            str(parent) for mount in (*self._mounts, *PODMAN_FILES) for parent in (Path(mount), *Path(mount).parents)
        }
        return sorted(set(paths) - created)

    def _inspect(self, template: str) -> str:
        return run_podman("container", "inspect", "--format", template, self._name).stdout.strip()
