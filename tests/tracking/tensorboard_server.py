"""A real TensorBoard server in a process of its own."""

import json
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.monitoring.prometheus_server import free_port

START_SECONDS = 120
RELOAD_SECONDS = 1


class TensorBoard:
    def __init__(self, port: int) -> None:
        self._uri = f"http://127.0.0.1:{port}/data"

    def get(self, path: str, **parameters: str) -> Any:
        url = f"{self._uri}/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=60) as response:
            return json.load(response)

    def tags(self) -> dict[str, list[str]]:
        """Return the names of all scalars, by run."""
        return {run: sorted(tags) for run, tags in self.get("plugin/scalars/tags").items()}

    def scalars(self, run: str, tag: str) -> list[tuple[float, int, float]]:
        """Return time, step and value of a scalar."""
        return [tuple(point) for point in self.get("plugin/scalars/scalars", run=run, tag=tag)]


@contextmanager
def run_tensorboard(directory: Path) -> Iterator[TensorBoard]:
    """Run a server that shows the event files of a directory."""
    port = free_port()
    arguments = ["--logdir", directory, "--port", port, "--reload_interval", RELOAD_SECONDS]
    log = directory.with_name("tensorboard.log")
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "tensorboard.main", *map(str, arguments)], stdout=output, stderr=output
        )
    try:
        server, deadline = TensorBoard(port), time.monotonic() + START_SECONDS
        while not _answers(server):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield server
    finally:
        process.kill()
        process.wait()


def _answers(server: TensorBoard) -> bool:
    try:
        return bool(server.tags())
    except OSError:
        return False
