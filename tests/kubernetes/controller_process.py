"""The controller as a process of its own, connected to the tests' API server."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

# The machine of the tests may be busy: the process needs a second to start, but sometimes ten.
TIMEOUT_SECONDS = 60.0


def until(find: Callable[[], Any], description: str, seconds: float = TIMEOUT_SECONDS) -> Any:
    """Call a function repeatedly until its result is true, and return the result."""
    deadline = time.monotonic() + seconds
    while not (result := find()):
        assert time.monotonic() < deadline, f"no {description} after {seconds} s"
        time.sleep(0.02)
    return result


class Controller:
    """`topwork controller` in its own process.

    Attributes:
        process: The process.
        messages: Its log so far: one mapping per line.
    """

    def __init__(self, kubeconfig: Path, *arguments: str, **variables: str) -> None:
        environment = {**os.environ, "KUBECONFIG": str(kubeconfig), "PYTHONWARNINGS": "error"} | variables
        self.process = subprocess.Popen(
            [sys.executable, "-m", "topwork", "controller", "--http-port=0", *arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.messages: list[dict[str, Any]] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> "Controller":
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.kill()

    def _read(self) -> None:
        assert self.process.stderr
        for line in self.process.stderr:
            try:
                self.messages.append(json.loads(line))
            except ValueError:
                self.messages.append({"level": "error", "message": line.rstrip("\n")})

    def kill(self) -> None:
        """Kill the process without a chance to clean up."""
        self.process.kill()
        self._close()

    def stop(self) -> int:
        """Send SIGTERM, and return the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.wait()

    def wait(self) -> int:
        """Wait until the process ends, and return the exit code."""
        code = self.process.wait(TIMEOUT_SECONDS)
        self._close()
        return code

    def _close(self) -> None:
        self.process.wait()
        self._reader.join()
        assert self.process.stderr
        self.process.stderr.close()

    def wait_for_message(self, text: str) -> dict[str, Any]:
        """Wait for a log line whose message or reason contains a text, and return it."""

        def find() -> dict[str, Any] | None:
            assert self._reader.is_alive() or self.process.poll() is None, self.messages
            lines = list(self.messages)
            return next((line for line in lines if text in f"{line['message']} {line.get('reason', '')}"), None)

        return until(find, f"message {text!r} in {self.messages}")

    def wait_until_leading(self) -> "Controller":
        self.wait_for_message("leading")
        return self

    @property
    def errors(self) -> list[dict[str, Any]]:
        """Log lines of the level error."""
        return [line for line in list(self.messages) if line["level"] == "error"]

    def get(self, path: str) -> tuple[int, str]:
        """Return status and text of a page of the HTTP port."""
        port = self.wait_for_message("controller started")["http_port"]
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
