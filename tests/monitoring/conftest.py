"""One real run of the demo's transfer job on two replicas, scraped by a real Prometheus with the chart's rules."""

import csv
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.monitoring.served import ROOT, Exporter, Prometheus, dcgm, free_port, kube_state, needed

from topwork.spec.loading.loader import read_files

NAMESPACE, TEAM = "ml", "vision"
FEW_EPOCHS = ["spec.transfer.epochs=3", "spec.fineTune.unfreeze.steps=[{layers: 1, epochs: 2, learningRate: 3.0e-4}]"]
TRANSFER = [*FEW_EPOCHS, "spec.metrics.lingerSeconds=10", "spec.evaluate.gates=[{metric: accuracy, atLeast: 0.0}]"]
BASE = ["spec.transfer.epochs=1", "spec.publish.formats=[keras]"]
# NVML's series of a machine with two GPUs: that one that runs the tests may have none.
NVML = {
    "topwork_gpu_utilization_ratio": 0.8,
    "topwork_gpu_memory_used_bytes": 3e10,
    "topwork_gpu_memory_total_bytes": 8.5e10,
    "topwork_gpu_power_watts": 250,
    "topwork_gpu_temperature_celsius": 60,
}


@dataclass(frozen=True)
class Watched:
    """What was seen of the run, and what it has written.

    Attributes:
        prometheus: Holds all series of the run.
        transferjob: Name of the job.
        run: Name of the run.
        start: When Prometheus was started (Unix time).
        end: A moment after the run's last stage, while its process still answered.
        page: The last page of metrics, as text.
        history: Rows of history.csv.
        metrics: Content of metrics.json.
    """

    prometheus: Prometheus
    transferjob: str
    run: str
    start: float
    end: float
    page: str
    history: list[dict[str, str]]
    metrics: dict[str, Any]

    @property
    def values(self) -> dict[str, str]:
        """What Grafana puts for the variables of a dashboard when this run is looked at."""
        return {
            "namespace": NAMESPACE,
            "team": TEAM,
            "transferjob": self.transferjob,
            "run": self.run,
            "__range": f"{int(self.end - self.start)}s",
            "__rate_interval": "4s",
        }


@pytest.fixture(scope="session")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    needed("prometheus")
    folder = tmp_path_factory.mktemp("watched")
    file = ROOT / "examples/solar-transfer.yaml"
    ((_, job),) = read_files([file], TRANSFER)
    topwork(folder, "run", str(ROOT / "examples/solar-base.yaml"), *setting(BASE), pictures=True)
    pod, port, exporter = f"{job.run}-abcde", free_port(), Exporter()
    exporter.pages |= {
        "/kube": kube_state(NAMESPACE, job.run, pod, complete=False),
        "/dcgm": dcgm(NAMESPACE, pod),
        "/nvml": nvml(job.metadata.name, job.run),
    }
    start = time.time()
    prometheus = Prometheus(folder / "prometheus", scrape_configs(exporter.address, port, pod))
    # GPU-hours have a point each full minute: one must lie within the run, which takes half a minute or more.
    time.sleep((45 - time.time()) % 60)
    running = begun(folder, "run", str(file), "--replicas", "2", "--metrics-port", str(port), *setting(TRANSFER))
    try:
        prometheus.until("topwork_exit_code", running)
        time.sleep(3)
        page, end = read(port), time.time()
        assert running.wait(timeout=300) == 0, (folder / "topwork.log").read_text()
        exporter.pages["/kube"] = kube_state(NAMESPACE, job.run, pod, complete=True)
        topwork(folder, "models", "fetch", str(job.spec.storage), str(job.metadata.name), str(folder / "fetched"))
        history = list(csv.DictReader((folder / "fetched/history.csv").read_text().splitlines()))
        metrics = json.loads((folder / "fetched/metrics.json").read_text())
        yield Watched(prometheus, job.metadata.name, job.run, start, end, page, history, metrics)
    finally:
        running.kill()
        running.wait()
        prometheus.stop()
        exporter.stop()


def scrape_configs(exporter: str, port: int, pod: str) -> list[dict[str, Any]]:
    """Scrape the run with the labels that a PodMonitor gives, and the exporter as the usual charts do."""
    ours = {"namespace": NAMESPACE, "pod": pod, "container": "fine-tune", "team": TEAM}
    operator = {"namespace": "gpu-operator", "pod": "dcgm-exporter-1", "container": "exporter"}
    return [
        {"job_name": "topwork", "static_configs": [{"targets": [f"127.0.0.1:{port}"], "labels": ours}]},
        {"job_name": "nvml", "metrics_path": "/nvml", "static_configs": [{"targets": [exporter], "labels": ours}]},
        {
            "job_name": "kube-state-metrics",
            "metrics_path": "/kube",
            "honor_labels": True,
            "static_configs": [{"targets": [exporter]}],
        },
        {"job_name": "dcgm", "metrics_path": "/dcgm", "static_configs": [{"targets": [exporter], "labels": operator}]},
    ]


def nvml(job: str, run: str) -> str:
    """A page of the GPUs' series."""
    lines = [
        f'{name}{{transferjob="{job}",run="{run}",gpu="{gpu}"}} {value}' for name, value in NVML.items() for gpu in "01"
    ]
    return "\n".join([*lines, ""])


def setting(values: list[str]) -> list[str]:
    return [argument for value in values for argument in ("--set", value)]


def environment(folder: Path) -> dict[str, str]:
    """No AWS setting, and a home and a state folder of its own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "TOPWORK_"))}
    return kept | {"HOME": str(folder / "home"), "TOPWORK_STATE": str(folder / "state"), "NO_COLOR": "1"}


def topwork(folder: Path, *arguments: str, pictures: bool = False) -> None:
    """Call `topwork` as a user would; with the demo's pictures in its storage, if asked for."""
    commands = [[sys.executable, "-m", "topwork", *arguments]]
    if pictures:
        commands.insert(0, [sys.executable, str(ROOT / "examples/solar/pictures.py")])
    for command in commands:
        subprocess.run(command, env=environment(folder), cwd=folder, check=True, capture_output=True, timeout=900)


def begun(folder: Path, *arguments: str) -> "subprocess.Popen[bytes]":
    """Start `topwork`, and do not wait for it."""
    with (folder / "topwork.log").open("w") as log:
        command = [sys.executable, "-m", "topwork", *arguments]
        return subprocess.Popen(command, env=environment(folder), cwd=folder, stdout=log, stderr=log)


def read(port: int) -> str:
    """Read the page of metrics as Prometheus does."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
        return answer.read().decode()
