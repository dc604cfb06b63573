"""A real Prometheus server, and an exporter with the series that a cluster exposes for a pod of topwork."""

import json
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
RULES = ROOT / "charts/topwork/rules"


def require_command(command: str) -> str:
    """Return the path of a command; skip the test if it is not installed."""
    path = shutil.which(command)
    if not path:
        pytest.skip(f"{command} is not installed; install it with: make prometheus")
    return path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Prometheus:
    """Prometheus with the rules of the chart; scrapes and evaluates once per second."""

    def __init__(self, directory: Path, scrape_configs: Sequence[Mapping[str, Any]], *, rules: bool = True) -> None:
        """Start the server, and wait until it is ready.

        Args:
            directory: Directory for data and configuration.
            scrape_configs: Value of `scrape_configs` in the configuration.
            rules: Whether to evaluate the rules of the chart.
        """
        directory.mkdir(parents=True, exist_ok=True)
        config = {
            "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(RULES / "*.yaml")] if rules else [],
            "scrape_configs": list(scrape_configs),
        }
        (directory / "prometheus.yml").write_text(yaml.safe_dump(config))
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._log = (directory / "log").open("w")
        self._process = subprocess.Popen(
            [
                require_command("prometheus"),
                f"--config.file={directory / 'prometheus.yml'}",
                f"--storage.tsdb.path={directory / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=self._log,
            stderr=self._log,
        )
        self._wait(directory / "log")

    def _wait(self, log: Path) -> None:
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"{self.url}/-/ready", timeout=5):
                    return
            except (urllib.error.URLError, TimeoutError):
                assert self._process.poll() is None, log.read_text()
                time.sleep(0.2)
        raise AssertionError(log.read_text())

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(timeout=30)
        self._log.close()

    def api(self, path: str, **parameters: str | float) -> Any:
        """Call the HTTP API; a query error fails the test with its message."""
        data = urllib.parse.urlencode(parameters)
        try:
            with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{data}", timeout=60) as response:
                return json.load(response)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{parameters}: {error.read().decode()}") from error

    def query(self, query: str, at: float | None = None) -> list[dict[str, Any]]:
        """Evaluate a query at a Unix time, or now."""
        return self.api("query", query=query, time=at or time.time())["result"]

    def value(self, query: str, at: float | None = None) -> float:
        """Return the value of a query with exactly one result."""
        results = self.query(query, at)
        assert len(results) == 1, (query, results)
        return float(results[0]["value"][1])

    def query_range(self, query: str, start: float, end: float) -> list[dict[str, Any]]:
        """Evaluate a query once per second in a time range."""
        return self.api("query_range", query=query, start=start, end=end, step=1)["result"]

    def wait_for(self, query: str, process: "subprocess.Popen[bytes] | None" = None, seconds: float = 900) -> None:
        """Wait until a query has a result, while the process that produces it is running."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.query(query):
                return
            assert process is None or process.poll() is None, f"{query} has no result, and the process has ended"
            time.sleep(0.5)
        raise AssertionError(f"{query} has no result after {seconds} seconds")


class Exporter:
    """Serves text pages that tests can change, like an exporter. A function creates its page at each scrape."""

    def __init__(self) -> None:
        self.pages: dict[str, str | Callable[[], str]] = {}
        pages = self.pages

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                page = pages.get(self.path)
                text = page() if callable(page) else page
                self.send_response(200 if text is not None else 404)
                self.send_header("Content-Type", "text/plain; version=0.0.4")
                self.end_headers()
                self.wfile.write((text or "").encode())

            def log_message(self, *arguments: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.address = f"127.0.0.1:{self._server.server_port}"

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def kube_state_page(namespace: str, run: str, *pods: str, complete: bool, gpus: int = 2) -> str:
    """Return the kube-state-metrics page for a Job and its pods, each with some GPUs."""
    job_labels = f'namespace="{namespace}",job_name="{run}"'
    return "\n".join(
        [
            *(line for pod in pods for line in _kube_pod_lines(namespace, pod, complete=complete, gpus=gpus)),
            f"kube_job_status_start_time{{{job_labels}}} {time.time() - 30:.0f}",
            f"kube_job_status_suspended{{{job_labels}}} 0",
            f'kube_job_failed{{{job_labels},condition="true"}} 0',
            f'kube_job_complete{{{job_labels},condition="true"}} {int(complete)}',
            "",
        ]
    )


def _kube_pod_lines(namespace: str, pod: str, *, complete: bool, gpus: int) -> list[str]:
    pod_labels = f'namespace="{namespace}",pod="{pod}"'
    requests = f'kube_pod_container_resource_requests{{{pod_labels},container="fine-tune",node="node-1"'
    phases = {"Pending": 0, "Running": int(not complete), "Succeeded": int(complete), "Failed": 0, "Unknown": 0}
    return [
        f'{requests},resource="cpu",unit="core"}} 8',
        f'{requests},resource="nvidia_com_gpu",unit="integer"}} {gpus}',
        *(f'kube_pod_status_phase{{{pod_labels},phase="{name}"}} {value}' for name, value in phases.items()),
        *(
            f'kube_pod_container_status_restarts_total{{{pod_labels},container="{name}"}} 0'
            for name in ("pull", "transfer", "fine-tune")
        ),
    ]


def dcgm_page(namespace: str, pod: str, gpus: int = 2) -> str:
    """Return the dcgm-exporter page for the GPUs of a pod, on a machine with one more, unused GPU."""
    lines = []
    for gpu, is_used in [(str(index), index < gpus) for index in range(gpus + 1)]:
        pod_labels = f'namespace="{namespace}",pod="{pod}",container="fine-tune"' if is_used else ""
        labels = ",".join(filter(None, [f'gpu="{gpu}",UUID="GPU-{gpu}",modelName="NVIDIA A100"', pod_labels]))
        for name, value in (("GPU_UTIL", 80), ("FB_USED", 30000), ("FB_FREE", 51000), ("POWER_USAGE", 250.5)):
            lines.append(f"DCGM_FI_DEV_{name}{{{labels}}} {value if is_used else 0}")
    return "\n".join([*lines, ""])
