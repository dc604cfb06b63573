"""A real run on two nodes, scraped by a real Prometheus: dashboards have data, and series match the history."""

import csv
import json
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.monitoring.conftest import (
    BASE,
    NAMESPACE,
    TEAM,
    TRANSFER,
    name_of_run,
    run_topwork,
    set_options,
    start_topwork,
)
from tests.monitoring.dashboards import NODES_ROW, PanelQuery, queries, substitute_variables
from tests.monitoring.prometheus_server import ROOT, Prometheus, require_command

JOB, IMAGES_PER_EPOCH, BATCH_SIZE = "solar-transfer", 20, 10
NEEDS_GPUS_OR_A_CLUSTER = ("GPUs", "Pods", "Controller")

pytestmark = pytest.mark.timeout(1800)


class Targets:
    """Tells Prometheus the metrics ports of the nodes, which their log lines name."""

    def __init__(self, log: Path, run: str) -> None:
        self.file = log.with_name("targets.json")
        self.file.write_text("[]")
        self._log, self._run, self._stop = log, run, threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    @property
    def scrape_config(self) -> dict[str, Any]:
        files = {"files": [str(self.file)], "refresh_interval": "1s"}
        return {"job_name": "topwork", "file_sd_configs": [files]}

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _follow(self) -> None:
        while not self._stop.wait(0.2):
            text = self._log.read_text() if self._log.exists() else ""
            lines = re.findall(r"\] metrics +(.*)", text)
            fields = [dict(re.findall(r"(\w+)=(\d+)", line)) for line in lines]
            content = json.dumps(list(self._targets([line for line in fields if "node" in line])))
            if content != self.file.read_text():
                # Prometheus must not read half of the file.
                temporary = self.file.with_suffix(".tmp")
                temporary.write_text(content)
                temporary.replace(self.file)

    def _targets(self, fields: list[dict[str, str]]) -> Iterator[dict[str, Any]]:
        """Yield the targets with the labels of a PodMonitor. The first process of a node runs transfer."""
        seen: set[str] = set()
        for line in fields:
            container = "fine-tune" if line["node"] in seen else "transfer"
            seen.add(line["node"])
            pod = f"{self._run}-{line['node']}-abcde"
            labels = {"namespace": NAMESPACE, "team": TEAM, "pod": pod, "container": container}
            yield {"targets": [f"127.0.0.1:{line['port']}"], "labels": labels}


@dataclass(frozen=True)
class RunOnTwoNodes:
    """The metrics and the history of the run."""

    prometheus: Prometheus
    run: str
    start: float
    end: float
    history: list[dict[str, str]]

    def last_values(self, counter: str) -> dict[str, float]:
        """Return the last value of a counter on each node that reports it, in the processes that wait for a scrape."""
        window = f"{int(self.end - self.start)}s"
        labels = f'run="{self.run}", container="fine-tune"'
        result = self.prometheus.query(f"last_over_time({counter}{{{labels}}}[{window}])", self.end)
        return {series["metric"]["node"]: float(series["value"][1]) for series in result}


@pytest.fixture(scope="module")
def two_nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunOnTwoNodes]:
    require_command("prometheus")
    directory = tmp_path_factory.mktemp("two_nodes")
    file = str(ROOT / f"tests/fixtures/jobs/{JOB}.yaml")
    base = str(ROOT / "tests/fixtures/jobs/solar-base.yaml")
    run_topwork(directory, "run", base, *set_options(BASE), with_images=True)
    run = name_of_run(directory, file, *set_options(TRANSFER))
    targets = Targets(directory / "topwork.log", run)
    prometheus = Prometheus(directory / "prometheus", [targets.scrape_config])
    start = time.time()
    process = start_topwork(directory, "run", file, "--nodes", "2", *set_options(TRANSFER))
    try:
        prometheus.wait_for('topwork_exit_code{stage="fine-tune"}', process)
        time.sleep(3)
        end = time.time()
        assert process.wait(timeout=300) == 0, (directory / "topwork.log").read_text()
        run_topwork(directory, "models", "fetch", "s3://topwork/solar", JOB, str(directory / "fetched"))
        history = list(csv.DictReader((directory / "fetched/history.csv").read_text().splitlines()))
        yield RunOnTwoNodes(prometheus, run, start, end, history)
    finally:
        process.kill()
        process.wait()
        prometheus.stop()
        targets.stop()


def test_steps_and_images_are_counted_once(two_nodes: RunOnTwoNodes):
    rows = [row for row in two_nodes.history if row["stage"] == "fine-tune"]
    images = IMAGES_PER_EPOCH * len(rows)
    assert two_nodes.last_values("topwork_images_total") == {"0": images}
    assert two_nodes.last_values("topwork_steps_total") == {"0": images / BATCH_SIZE}
    assert two_nodes.last_values("topwork_step_duration_seconds_count") == {"0": images / BATCH_SIZE}
    seconds = sum(float(row["seconds"]) for row in rows)
    assert two_nodes.last_values("topwork_step_duration_seconds_sum") == {"0": pytest.approx(seconds)}


def test_results_match_the_history(two_nodes: RunOnTwoNodes):
    last = two_nodes.history[-1]
    for series, value in {
        'topwork_loss{split="train"}': float(last["loss"]),
        'topwork_metric{split="validation", name="accuracy"}': float(last["validation_accuracy"]),
        "topwork_learning_rate": float(last["learning_rate"]),
        'topwork_epoch{stage="transfer"}': sum(row["stage"] == "transfer" for row in two_nodes.history),
        'topwork_epoch{stage="fine-tune"}': sum(row["stage"] == "fine-tune" for row in two_nodes.history),
        "topwork_replicas": 2,
        "topwork_nodes": 2,
        "topwork_exit_code": 0,
    }.items():
        assert two_nodes.prometheus.value(series, two_nodes.end) == value, series


def test_each_node_reports_its_share_of_the_evaluation(two_nodes: RunOnTwoNodes):
    images = two_nodes.last_values("topwork_evaluation_images_total")
    assert images.keys() == {"0", "1"}
    epochs = sum(row["stage"] == "fine-tune" for row in two_nodes.history)
    # Each evaluation has 50 images of each of the two classes; batches are padded.
    assert images["0"] == images["1"] >= 50 * epochs
    assert all(seconds > 0 for seconds in two_nodes.last_values("topwork_evaluation_seconds_total").values())


SHOWN = [query for query in queries() if query.row not in NEEDS_GPUS_OR_A_CLUSTER]
SHOWN = [query for query in SHOWN if "topwork:run_gpus" not in query.expr]


@pytest.mark.parametrize("panel", SHOWN, ids=[panel.name for panel in SHOWN])
def test_every_panel_query_has_data(two_nodes: RunOnTwoNodes, panel: PanelQuery):
    values = {
        "namespace": NAMESPACE,
        "team": TEAM,
        "transferjob": JOB,
        "run": two_nodes.run,
        "__range": f"{int(two_nodes.end - two_nodes.start)}s",
        "__rate_interval": "4s",
    }
    result = two_nodes.prometheus.query_range(substitute_variables(panel.expr, values), two_nodes.start, two_nodes.end)
    found = {value for series in result for _, value in series["values"]}
    assert found - {"NaN"}
    if panel.row == NODES_ROW and panel.panel.endswith("of each node"):
        assert {series["metric"]["node"] for series in result} == {"0", "1"}


def test_the_run_is_one_run_and_no_alert_fires(two_nodes: RunOnTwoNodes):
    states = two_nodes.prometheus.query_range("count(topwork:run_state) by (run)", two_nodes.start, two_nodes.end)
    assert {value for series in states for _, value in series["values"]} == {"1"}
    alerts = two_nodes.prometheus.query_range('ALERTS{alertstate="firing"}', two_nodes.start, two_nodes.end)
    assert [series["metric"] for series in alerts] == []
