"""A simulated cluster: commands run as processes, and tests change objects as controllers and kubelets would."""

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

import sample_objects
from api_server import ApiServer

TIMEOUT_SECONDS = 30.0
Object = dict[str, Any]


def wait_for(find: Callable[[], Any], description: str) -> Any:
    """Call a function repeatedly until its result is true, and return the result."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not (result := find()):
        assert time.monotonic() < deadline, f"no {description} after {TIMEOUT_SECONDS} s"
        time.sleep(0.02)
    return result


class Command:
    """A topwork command in its own process, whose output is read line by line while it runs."""

    def __init__(self, *arguments: str, kubeconfig: Path) -> None:
        environment = {**os.environ, "KUBECONFIG": str(kubeconfig), "PYTHONWARNINGS": "error"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "topwork", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        self.lines: list[str] = []
        self._queue: queue.SimpleQueue[str | None] = queue.SimpleQueue()
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
            self._queue.put(line.rstrip("\n"))
        self._queue.put(None)

    def expect(self, prefix: str) -> str:
        """Wait for a line with this prefix."""
        while True:
            line = self._queue.get(timeout=TIMEOUT_SECONDS)
            assert line is not None, f"the command exited without printing {prefix!r}: {self.lines}"
            self.lines.append(line)
            if line.startswith(prefix):
                return line

    def wait(self) -> int:
        """Wait until the command exits, and return its exit code."""
        while (line := self._queue.get(timeout=TIMEOUT_SECONDS)) is not None:
            self.lines.append(line)
        return self.process.wait(TIMEOUT_SECONDS)

    @property
    def output(self) -> str:
        return "\n".join(self.lines)


class SimulatedCluster:
    """Creates and changes objects in place of the controllers, the scheduler and the kubelet."""

    def __init__(self, server: ApiServer) -> None:
        self.server = server

    def wait_for_job(self, name: str = sample_objects.RUN) -> Object:
        """Wait until the Job exists, and return it."""
        return wait_for(lambda: self.server.get("Job", name), f"Job {name}")

    def put_pod(
        self, containers: dict[str, Object] | None = None, *, job: str = sample_objects.RUN, **options: Any
    ) -> Object:
        """Create or replace a pod of a Job."""
        return self._put(sample_objects.pod(containers, of=self.wait_for_job(job), **options))

    def _put(self, pod: Object) -> Object:
        for statuses in (pod["status"].get(key, ()) for key in ("initContainerStatuses", "containerStatuses")):
            for container in statuses:
                if "terminated" in container["state"]:
                    self.server.end_log(pod["metadata"]["name"], container["name"])
        return self.server.put(pod)

    def put_pending_pod(self, message: str, **options: Any) -> Object:
        return self.server.put(sample_objects.pending_pod(message, of=self.wait_for_job(), **options))

    def put_event(self, involved: Object, reason: str, message: str, **options: Any) -> None:
        self.server.put(sample_objects.event(involved, reason, message, **options))

    def patch_job_status(self, *conditions: Object, job: str = sample_objects.RUN, **status: Any) -> None:
        """Change the status of a Job."""
        change = {**status, **({"conditions": list(conditions)} if conditions else {})}
        self.server.patch("Job", job, {"status": change})

    def complete_job(self, *, job: str = sample_objects.RUN) -> None:
        conditions = (sample_objects.success_criteria_met(), sample_objects.complete())
        self.patch_job_status(*conditions, job=job, succeeded=1, completionTime=sample_objects.at(600))

    def finish_run(self, **options: Any) -> None:
        """Complete the pod with a published model, and then the Job."""
        self._put(sample_objects.finished_pod(of=self.wait_for_job(), **options))
        self.complete_job()


def write_spec(path: Path, **compute: Any) -> Path:
    """Write the sample job spec with changed values of `spec.compute` to a file."""
    path.write_text(json.dumps(sample_objects.spec(**compute)))  # JSON is YAML
    return path
