"""`topwork top --prometheus` with a real Prometheus server that scrapes two processes."""

import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, start_http_server

from topwork.clients.prometheus.controller import ControllerMetrics, TransferJobSample
from topwork.clients.prometheus.metrics import Metrics

TIMEOUT_SECONDS = 60.0
RUN = "cats-1a2b3c4d"

pytestmark = pytest.mark.skipif(not shutil.which("prometheus"), reason="needs Prometheus: make prometheus")


def start_metrics(run: str, stage: str, node: int = 0, nodes: int = 1) -> Metrics:
    metrics = Metrics(gpus=False)
    job = run.rpartition("-")[0]
    metrics.start_job(job=job, run=run, stage=stage, version="1.2.3", node=node, nodes=nodes)
    return metrics


def controller_registry(run: str) -> CollectorRegistry:
    sample = TransferJobSample(
        "team-a", run.rpartition("-")[0], run, "Running", "transfer", "", "", 1, 0.0, 0.0, None, gpu_seconds=1.0
    )
    metrics = ControllerMetrics(lambda: [sample], "1.2.3")
    metrics.set_leader(True)
    return metrics.registry


def pod_target(port: int, name: str) -> dict[str, Any]:
    """Return a scrape target with the labels of a PodMonitor."""
    return {"targets": [f"127.0.0.1:{port}"], "labels": {"namespace": "team-a", "pod": name, "container": "transfer"}}


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Function that starts Prometheus, which scrapes the targets once per second; returns its URL."""
    processes: list[subprocess.Popen[bytes]] = []

    def start_prometheus(*targets: dict[str, Any]) -> str:
        scrape = {"job_name": "topwork", "honor_labels": True, "static_configs": list(targets)}
        config = {"global": {"scrape_interval": "1s", "scrape_timeout": "1s"}, "scrape_configs": [scrape]}
        (tmp_path / "prometheus.yml").write_text(json.dumps(config))  # JSON is YAML
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        command = ["prometheus", f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data"]
        command += [f"--web.listen-address={address}", "--web.external-url=/prometheus/", "--log.level=error"]
        processes.append(subprocess.Popen(command))
        return f"http://{address}/prometheus"

    yield start_prometheus
    for process in processes:
        process.terminate()
        process.wait(TIMEOUT_SECONDS)


def top(url: str, *arguments: str) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "topwork", "top", "--json", "--prometheus", url, *arguments]
    completed = subprocess.run(command, capture_output=True, text=True, check=False)
    return list(json.loads(completed.stdout)) if completed.returncode == 0 else []


def wait_for(find: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not (result := find()):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    return result


def count_samples(url: str, query: str) -> int:
    """Count the samples in the range of a query; 0 before Prometheus is ready."""
    try:
        with urllib.request.urlopen(f"{url}/api/v1/query?query={query}", timeout=5) as response:
            return sum(len(series["values"]) for series in json.load(response)["data"]["result"])
    except OSError:
        return 0


def test_runs_are_read_with_rates_from_scrapes(start):
    metrics, other, outcome = (
        start_metrics(RUN, "transfer"),
        start_metrics("dogs-22222222", "pull"),
        start_metrics(RUN, "transfer"),
    )
    # Outcomes at a Pushgateway do not belong to a running process.
    pushgateway, _ = start_http_server(0, "127.0.0.1", registry=outcome.outcome_registry)
    ports = metrics.serve(0, "127.0.0.1"), other.serve(0, "127.0.0.1")
    # The controller reports the run too, in a series of its own process.
    controller, _ = start_http_server(0, "127.0.0.1", registry=controller_registry(RUN))
    gateway = {"targets": [f"127.0.0.1:{pushgateway.server_port}"]}
    with metrics.track_stage("transfer"), other.track_stage("pull"):
        metrics.set_planned_epochs("transfer", 20)
        metrics.set_epoch("transfer", 5)
        metrics.record_step(images=64, seconds=9.0)
        url = start(
            pod_target(ports[0], f"{RUN}-abcde"),
            pod_target(ports[1], "dogs-22222222-fghij"),
            gateway,
            pod_target(controller.server_port, "topwork-controller"),
        )
        wait_for(lambda: count_samples(url, "topwork_steps_total%5B1m%5D") >= 4)
        metrics.record_step(images=64, seconds=0.25)
        cats = wait_for(lambda: [run for run in top(url, "cats") if run["speed"]["lately"]])[0]
        assert [run["run"] for run in top(url)] == [RUN, "dogs-22222222"]
        assert [run["run"] for run in top(url, "-n", "team-a")] == [RUN, "dogs-22222222"]
        assert top(url, "-n", "team-b") == []
    assert (cats["namespace"], cats["pod"], cats["state"]) == ("team-a", f"{RUN}-abcde", "running")
    assert (cats["stage"], cats["epoch"], cats["epochs"]) == ("transfer", 5, 20)
    assert cats["speed"] == {"imagesPerSecond": 256.0, "stepSeconds": 0.25, "inputWait": None, "lately": True}
    assert cats["readSecondsAgo"] < 10


def test_nodes_of_a_run_are_read_as_one_run(start):
    nodes = [start_metrics(RUN, "transfer", node, 2) for node in range(2)]
    with nodes[0].track_stage("transfer"), nodes[1].track_stage("transfer"):
        for node, metrics in enumerate(nodes):
            metrics.record_evaluation_speed(images=100, seconds=1.0 + node)
            metrics.record_step(images=64, seconds=0.25)
        targets = [
            pod_target(metrics.serve(0, "127.0.0.1"), f"{RUN}-{node}-abcde") for node, metrics in enumerate(nodes)
        ]
        url = start(*targets)
        (run,) = wait_for(lambda: [run for run in top(url) if len(run["nodes"]) == 2])
    assert (run["run"], run["pod"], run["nodeCount"]) == (RUN, f"{RUN}-0-abcde", 2)
    assert [(node["index"], node["pod"], node["evaluatedPerSecond"]) for node in run["nodes"]] == [
        (0, f"{RUN}-0-abcde", 100.0),
        (1, f"{RUN}-1-abcde", 50.0),
    ]
