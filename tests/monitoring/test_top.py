"""`topwork top --prometheus`: a real Prometheus scrapes processes, and their runs are read from it."""

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
from prometheus_client import start_http_server

from topwork.clients.prometheus.metrics import Metrics

PATIENCE_SECONDS = 60.0
RUN = "cats-1a2b3c4d"

pytestmark = pytest.mark.skipif(not shutil.which("prometheus"), reason="needs Prometheus: make prometheus")


def process(run: str, stage: str) -> Metrics:
    metrics = Metrics(gpus=False)
    metrics.start_job(job=run.rpartition("-")[0], run=run, stage=stage, version="1.2.3")
    return metrics


def pod(port: int, name: str) -> dict[str, Any]:
    """A target with the labels that a PodMonitor gives."""
    return {"targets": [f"127.0.0.1:{port}"], "labels": {"namespace": "team-a", "pod": name, "container": "transfer"}}


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Start a Prometheus that scrapes targets every second; gives its address."""
    started: list[subprocess.Popen[bytes]] = []

    def begin(*targets: dict[str, Any]) -> str:
        scrape = {"job_name": "topwork", "honor_labels": True, "static_configs": list(targets)}
        config = {"global": {"scrape_interval": "1s", "scrape_timeout": "1s"}, "scrape_configs": [scrape]}
        (tmp_path / "prometheus.yml").write_text(json.dumps(config))  # JSON is YAML
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        command = ["prometheus", f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data"]
        command += [f"--web.listen-address={address}", "--web.external-url=/prometheus/", "--log.level=error"]
        started.append(subprocess.Popen(command))
        return f"http://{address}/prometheus"

    yield begin
    for one in started:
        one.terminate()
        one.wait(PATIENCE_SECONDS)


def top(url: str, *words: str) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "topwork", "top", "--json", "--prometheus", url, *words]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    return list(json.loads(ended.stdout)) if ended.returncode == 0 else []


def eventually(find: Callable[[], Any]) -> Any:
    until = time.monotonic() + PATIENCE_SECONDS
    while not (found := find()):
        assert time.monotonic() < until
        time.sleep(0.2)
    return found


def samples_of(url: str, query: str) -> int:
    """How many samples a range holds; 0 before Prometheus is up."""
    try:
        with urllib.request.urlopen(f"{url}/api/v1/query?query={query}", timeout=5) as answer:
            return sum(len(one["values"]) for one in json.load(answer)["data"]["result"])
    except OSError:
        return 0


def test_runs_are_read_with_the_rates_of_their_scrapes(start):
    metrics, other, outcome = process(RUN, "transfer"), process("dogs-22222222", "pull"), process(RUN, "transfer")
    # What a Pushgateway keeps of a run has no process behind it.
    pushed, _ = start_http_server(0, "127.0.0.1", registry=outcome.outcome)
    ports = metrics.serve(0, "127.0.0.1"), other.serve(0, "127.0.0.1")
    gateway = {"targets": [f"127.0.0.1:{pushed.server_port}"]}
    with metrics.track_stage("transfer"), other.track_stage("pull"):
        metrics.set_planned_epochs("transfer", 20)
        metrics.set_epoch("transfer", 5)
        metrics.record_step(images=64, seconds=9.0)
        url = start(pod(ports[0], f"{RUN}-abcde"), {**pod(ports[1], "dogs-22222222-fghij")}, gateway)
        eventually(lambda: samples_of(url, "topwork_steps_total%5B1m%5D") >= 4)
        metrics.record_step(images=64, seconds=0.25)
        cats = eventually(lambda: [one for one in top(url, "cats") if one["speed"]["lately"]])[0]
        assert [one["run"] for one in top(url)] == [RUN, "dogs-22222222"]
        assert [one["run"] for one in top(url, "-n", "team-a")] == [RUN, "dogs-22222222"]
        assert top(url, "-n", "team-b") == []
    assert (cats["namespace"], cats["pod"], cats["state"]) == ("team-a", f"{RUN}-abcde", "running")
    assert (cats["stage"], cats["epoch"], cats["epochs"]) == ("transfer", 5, 20)
    assert cats["speed"] == {"imagesPerSecond": 256.0, "stepSeconds": 0.25, "inputWait": None, "lately": True}
    assert cats["readSecondsAgo"] < 10
