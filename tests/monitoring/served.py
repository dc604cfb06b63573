"""A real Prometheus, and an exporter with the series that a cluster has of a pod of topwork."""

import json
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
RULES = ROOT / "charts/topwork/rules"


def needed(command: str) -> str:
    """Find a command of Debian's packages, or say how to get it."""
    found = shutil.which(command)
    if not found:
        pytest.skip(f"{command} is not installed; make prometheus does it.")
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Prometheus:
    """Prometheus with the chart's rules; scrapes and evaluates once a second."""

    def __init__(self, folder: Path, scraped: Sequence[Mapping[str, Any]], *, rules: bool = True) -> None:
        """Start it, and wait until it answers.

        Args:
            folder: Where its data and configuration go.
            scraped: What stands below `scrape_configs`.
            rules: Whether to evaluate the chart's rules.
        """
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(RULES / "*.yaml")] if rules else [],
            "scrape_configs": list(scraped),
        }
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._log = (folder / "log").open("w")
        self._process = subprocess.Popen(
            [
                needed("prometheus"),
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=self._log,
            stderr=self._log,
        )
        self._wait(folder / "log")

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

    def ask(self, path: str, **parameters: str | float) -> Any:
        """Ask its API; an error of a query fails the test with its words."""
        data = urllib.parse.urlencode(parameters)
        try:
            with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{data}", timeout=60) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{parameters}: {error.read().decode()}") from error

    def now(self, query: str, moment: float | None = None) -> list[dict[str, Any]]:
        """Evaluate a query at a moment (Unix time), or now."""
        return self.ask("query", query=query, time=moment or time.time())["result"]

    def value(self, query: str, moment: float | None = None) -> float:
        """Give the value of a query that has exactly one."""
        found = self.now(query, moment)
        assert len(found) == 1, (query, found)
        return float(found[0]["value"][1])

    def over(self, query: str, start: float, end: float) -> list[dict[str, Any]]:
        """Evaluate a query once a second within a range."""
        return self.ask("query_range", query=query, start=start, end=end, step=1)["result"]

    def until(self, query: str, running: "subprocess.Popen[bytes] | None" = None, seconds: float = 900) -> None:
        """Wait until a query gives anything; not longer than a process runs that makes it so."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.now(query):
                return
            assert running is None or running.poll() is None, f"{query} gave nothing, and the process has ended"
            time.sleep(0.5)
        raise AssertionError(f"{query} gave nothing in {seconds} seconds")


class Exporter:
    """Serves pages of text that can change, as exporters do."""

    def __init__(self) -> None:
        self.pages: dict[str, str] = {}
        pages = self.pages

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                text = pages.get(self.path)
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


def kube_state(namespace: str, run: str, pod: str, *, complete: bool) -> str:
    """What kube-state-metrics has of a pod with two GPUs and of its Job."""
    of_pod = f'namespace="{namespace}",pod="{pod}"'
    asked = f'kube_pod_container_resource_requests{{{of_pod},container="fine-tune",node="node-1"'
    of_job = f'namespace="{namespace}",job_name="{run}"'
    phases = {"Pending": 0, "Running": int(not complete), "Succeeded": int(complete), "Failed": 0, "Unknown": 0}
    return "\n".join(
        [
            f'{asked},resource="cpu",unit="core"}} 8',
            f'{asked},resource="nvidia_com_gpu",unit="integer"}} 2',
            *(f'kube_pod_status_phase{{{of_pod},phase="{name}"}} {value}' for name, value in phases.items()),
            *(
                f'kube_pod_container_status_restarts_total{{{of_pod},container="{name}"}} 0'
                for name in ("pull", "transfer", "fine-tune")
            ),
            f"kube_job_status_start_time{{{of_job}}} {time.time() - 30:.0f}",
            f"kube_job_status_suspended{{{of_job}}} 0",
            f'kube_job_failed{{{of_job},condition="true"}} 0',
            f'kube_job_complete{{{of_job},condition="true"}} {int(complete)}',
            "",
        ]
    )


def dcgm(namespace: str, pod: str) -> str:
    """What dcgm-exporter has of the two GPUs of a pod, on a node whose third is nobody's."""
    lines = []
    for gpu, held in (("0", True), ("1", True), ("2", False)):
        owner = f'namespace="{namespace}",pod="{pod}",container="fine-tune"' if held else ""
        labels = ",".join(filter(None, [f'gpu="{gpu}",UUID="GPU-{gpu}",modelName="NVIDIA A100"', owner]))
        for name, value in (("GPU_UTIL", 80), ("FB_USED", 30000), ("FB_FREE", 51000), ("POWER_USAGE", 250.5)):
            lines.append(f"DCGM_FI_DEV_{name}{{{labels}}} {value if held else 0}")
    return "\n".join([*lines, ""])
