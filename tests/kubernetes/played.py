"""A cluster played step by step: commands run as users run them, and a test does what a cluster would."""

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import states
from api_server import ApiServer

PATIENCE_SECONDS = 30.0
Object = dict[str, Any]


def eventually(find: Callable[[], Any], what: str) -> Any:
    """Wait for something that comes true soon."""
    until = time.monotonic() + PATIENCE_SECONDS
    while not (found := find()):
        assert time.monotonic() < until, f"no {what} after {PATIENCE_SECONDS} s"
        time.sleep(0.02)
    return found


class Command:
    """A command of topwork in a process of its own, whose lines are read as they come."""

    def __init__(self, *words: str, kubeconfig: Path) -> None:
        environment = {**os.environ, "KUBECONFIG": str(kubeconfig), "PYTHONWARNINGS": "error"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "topwork", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        self.lines: list[str] = []
        self._arrived: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> "Command":
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()
        assert self.process.stdout
        self.process.stdout.close()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self._arrived.put(line.rstrip("\n"))
        self._arrived.put(None)

    def expect(self, beginning: str) -> str:
        """Wait for a line that begins so."""
        while True:
            line = self._arrived.get(timeout=PATIENCE_SECONDS)
            assert line is not None, f"ended without {beginning!r}: {self.lines}"
            self.lines.append(line)
            if line.startswith(beginning):
                return line

    def end(self) -> int:
        """Wait for the end; the exit code."""
        while (line := self._arrived.get(timeout=PATIENCE_SECONDS)) is not None:
            self.lines.append(line)
        return self.process.wait(PATIENCE_SECONDS)

    @property
    def text(self) -> str:
        return "\n".join(self.lines)


class Played:
    """The controllers, the scheduler and the kubelet of a cluster, as far as they make or change objects."""

    def __init__(self, server: ApiServer) -> None:
        self.server = server

    def job(self, name: str = states.RUN) -> Object:
        """The Job, as soon as it was applied."""
        return eventually(lambda: self.server.get("Job", name), f"Job {name}")

    def pod(self, containers: dict[str, Object] | None = None, *, job: str = states.RUN, **facts: Any) -> Object:
        """Make or change a pod of a Job."""
        return self._put(states.pod(containers, of=self.job(job), **facts))

    def _put(self, pod: Object) -> Object:
        for status in (pod["status"].get(key, ()) for key in ("initContainerStatuses", "containerStatuses")):
            for container in status:
                if "terminated" in container["state"]:
                    self.server.end_log(pod["metadata"]["name"], container["name"])
        return self.server.put(pod)

    def pending(self, message: str, **facts: Any) -> Object:
        return self.server.put(states.pending_pod(message, of=self.job(), **facts))

    def event(self, about: Object, reason: str, message: str, **facts: Any) -> None:
        self.server.put(states.event(about, reason, message, **facts))

    def status(self, *conditions: Object, job: str = states.RUN, **status: Any) -> None:
        """Change the status of a Job."""
        change = {**status, **({"conditions": list(conditions)} if conditions else {})}
        self.server.patch("Job", job, {"status": change})

    def succeed(self, *, job: str = states.RUN) -> None:
        self.status(
            states.success_criteria_met(), states.complete(), job=job, succeeded=1, completionTime=states.at(600)
        )

    def finish(self, **facts: Any) -> None:
        """Let the last pod publish, and the Job be complete."""
        self._put(states.finished_pod(of=self.job(), **facts))
        self.succeed()


def spec_file(path: Path, **compute: Any) -> Path:
    path.write_text(json.dumps(states.spec(**compute)))  # JSON is YAML
    return path
