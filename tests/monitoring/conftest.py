"""A real run of the demo job on two replicas, scraped by a real Prometheus server with the rules of the chart."""

import csv
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from tests.monitoring.prometheus_server import (
    ROOT,
    Exporter,
    Prometheus,
    dcgm_page,
    free_port,
    kube_state_page,
    require_command,
)

from topwork.clients.prometheus.controller import ControllerMetrics, TransferJobSample
from topwork.spec.loading.loader import read_files

NAMESPACE, TEAM = "ml", "vision"
FEW_EPOCHS = ["spec.transfer.epochs=3", "spec.fineTune.unfreeze.steps=[{layers: 1, epochs: 2, learningRate: 3.0e-4}]"]
TRANSFER = [*FEW_EPOCHS, "spec.metrics.lingerSeconds=10", "spec.evaluate.gates=[{metric: accuracy, atLeast: 0.0}]"]
BASE = ["spec.transfer.epochs=1", "spec.publish.formats=[keras]"]
# NVML series of a machine with two GPUs, because the test machine may have none.
NVML = {
    "topwork_gpu_utilization_ratio": 0.8,
    "topwork_gpu_memory_used_bytes": 3e10,
    "topwork_gpu_memory_total_bytes": 8.5e10,
    "topwork_gpu_power_watts": 250,
    "topwork_gpu_temperature_celsius": 60,
}


@dataclass(frozen=True)
class ObservedRun:
    """The metrics and the results of the run.

    Attributes:
        prometheus: Server with all series of the run.
        without_kube_state: Server with the series of the run and of the controller, but not those of kube-state-metrics
            and DCGM.
        transferjob: Name of the job.
        run: Name of the run.
        start: Unix time at which Prometheus started.
        end: Unix time after the last stage, while the process still served metrics.
        page: The last metrics page, as text.
        history: Rows of history.csv.
        metrics: Content of metrics.json.
    """

    prometheus: Prometheus
    without_kube_state: Prometheus
    transferjob: str
    run: str
    start: float
    end: float
    page: str
    history: list[dict[str, str]]
    metrics: dict[str, Any]

    @property
    def values(self) -> dict[str, str]:
        """Values of the dashboard variables when this run is selected in Grafana."""
        return {
            "namespace": NAMESPACE,
            "team": TEAM,
            "transferjob": self.transferjob,
            "run": self.run,
            "__range": f"{int(self.end - self.start)}s",
            "__rate_interval": "4s",
        }


@pytest.fixture(scope="session")
def observed_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObservedRun]:
    require_command("prometheus")
    directory = tmp_path_factory.mktemp("observed_run")
    file = ROOT / "tests/fixtures/jobs/solar-transfer.yaml"
    ((_, job),) = read_files([file], TRANSFER)
    run_topwork(
        directory, "run", str(ROOT / "tests/fixtures/jobs/solar-base.yaml"), *set_options(BASE), with_images=True
    )
    job = job.as_run(name_of_run(directory, str(file), *set_options(TRANSFER)))
    pod, port, exporter = f"{job.run}-abcde", free_port(), Exporter()
    controller = Controller(job.metadata.name, job.run)
    exporter.pages |= {
        "/kube": kube_state_page(NAMESPACE, job.run, pod, complete=False),
        "/dcgm": dcgm_page(NAMESPACE, pod),
        "/nvml": nvml_page(job.metadata.name, job.run),
        "/controller": controller.page,
    }
    start = time.time()
    configs = scrape_configs(exporter.address, port, pod)
    prometheus = Prometheus(directory / "prometheus", configs)
    without_kube_state = Prometheus(
        directory / "without_kube_state",
        [config for config in configs if config["job_name"] not in {"kube-state-metrics", "dcgm"}],
    )
    # The pause below may be short, but tests expect samples of the pending run.
    for server in (prometheus, without_kube_state):
        server.wait_for(f'count_over_time(topwork:run_state{{run="{job.run}"}}[1m]) >= 3')
    # GPU-hours are sampled at each full minute. Start 15 seconds before one, because the run takes at least 30 seconds.
    time.sleep((45 - time.time()) % 60)
    controller.set_state("Running", started=time.time())
    process = start_topwork(
        directory, "run", str(file), "--replicas", "2", "--metrics-port", str(port), *set_options(TRANSFER)
    )
    try:
        prometheus.wait_for("topwork_exit_code", process)
        time.sleep(3)
        page, end = scrape(port), time.time()
        assert process.wait(timeout=300) == 0, (directory / "topwork.log").read_text()
        exporter.pages["/kube"] = kube_state_page(NAMESPACE, job.run, pod, complete=True)
        controller.set_state("Complete", completed=time.time())
        run_topwork(
            directory, "models", "fetch", str(job.spec.storage), str(job.metadata.name), str(directory / "fetched")
        )
        history = list(csv.DictReader((directory / "fetched/history.csv").read_text().splitlines()))
        metrics = json.loads((directory / "fetched/metrics.json").read_text())
        yield ObservedRun(
            prometheus, without_kube_state, job.metadata.name, job.run, start, end, page, history, metrics
        )
    finally:
        process.kill()
        process.wait()
        prometheus.stop()
        without_kube_state.stop()
        exporter.stop()


class Controller:
    """The metrics page of a controller that manages a TransferJob and reconciles it at each scrape."""

    def __init__(self, transferjob: str, run: str) -> None:
        self._sample = TransferJobSample(
            namespace=NAMESPACE,
            name=transferjob,
            run=run,
            state="Pending",
            stage="",
            model="",
            queue="",
            gpus=2,
            created=time.time(),
            started=None,
            completed=None,
            gpu_seconds=0.0,
            team=TEAM,
        )
        self._metrics = ControllerMetrics(lambda: [self._sample], "1.2.3")
        self._metrics.set_leader(True)

    def set_state(self, state: str, **changes: float) -> None:
        """Change the state and other values of the TransferJob."""
        self._sample = replace(self._sample, state=state, **changes)

    def page(self) -> str:
        self._metrics.observe_reconcile("ok", seconds=0.02)
        self._metrics.set_queue(depth=0, oldest_seconds=0.0)
        return self._metrics.page()[0].decode()


def scrape_configs(exporter: str, port: int, pod: str) -> list[dict[str, Any]]:
    """Return scrape configurations: the run with the labels of a PodMonitor, the exporters as in common charts."""
    run_labels = {"namespace": NAMESPACE, "pod": pod, "container": "fine-tune", "team": TEAM}
    controller_labels = {"namespace": "topwork", "pod": "topwork-controller-1", "container": "controller"}
    dcgm_labels = {"namespace": "gpu-operator", "pod": "dcgm-exporter-1", "container": "exporter"}
    return [
        {"job_name": "topwork", "static_configs": [{"targets": [f"127.0.0.1:{port}"], "labels": run_labels}]},
        {
            "job_name": "nvml",
            "metrics_path": "/nvml",
            "static_configs": [{"targets": [exporter], "labels": run_labels}],
        },
        {
            "job_name": "kube-state-metrics",
            "metrics_path": "/kube",
            "honor_labels": True,
            "static_configs": [{"targets": [exporter]}],
        },
        {
            "job_name": "dcgm",
            "metrics_path": "/dcgm",
            "static_configs": [{"targets": [exporter], "labels": dcgm_labels}],
        },
        {
            "job_name": "controller",
            "metrics_path": "/controller",
            "honor_labels": True,
            "static_configs": [{"targets": [exporter], "labels": controller_labels}],
        },
    ]


def nvml_page(job: str, run: str) -> str:
    """Return the page with the GPU series."""
    lines = [
        f'{name}{{transferjob="{job}",run="{run}",gpu="{gpu}"}} {value}' for name, value in NVML.items() for gpu in "01"
    ]
    return "\n".join([*lines, ""])


def set_options(values: list[str]) -> list[str]:
    return [argument for value in values for argument in ("--set", value)]


def environment(directory: Path) -> dict[str, str]:
    """Return an environment without AWS settings, with its own home and state directories."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "TOPWORK_"))}
    return variables | {"HOME": str(directory / "home"), "TOPWORK_STATE": str(directory / "state"), "NO_COLOR": "1"}


def run_topwork(directory: Path, *arguments: str, with_images: bool = False) -> None:
    """Run `topwork`, after storing the images of the demo if requested."""
    commands = [[sys.executable, "-m", "topwork", *arguments]]
    if with_images:
        commands.insert(0, [sys.executable, str(ROOT / "examples/solar/upload_images.py")])
    for command in commands:
        subprocess.run(command, env=environment(directory), cwd=directory, check=True, capture_output=True, timeout=900)


def name_of_run(directory: Path, *arguments: str) -> str:
    """Return the name that `topwork run` gives to a run: it depends on the images, too."""
    command = [sys.executable, "-m", "topwork", "describe", *arguments, "--json"]
    described = subprocess.run(command, env=environment(directory), cwd=directory, check=True, capture_output=True)
    return str(json.loads(described.stdout)[0]["run"])


def start_topwork(directory: Path, *arguments: str) -> "subprocess.Popen[bytes]":
    """Start `topwork` in the background."""
    with (directory / "topwork.log").open("w") as log:
        command = [sys.executable, "-m", "topwork", *arguments]
        return subprocess.Popen(command, env=environment(directory), cwd=directory, stdout=log, stderr=log)


def scrape(port: int) -> str:
    """Read the metrics page."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as response:
        return response.read().decode()
