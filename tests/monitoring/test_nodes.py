"""A run on two nodes next to one on one node: no value of a run is counted twice, and slow nodes are visible."""

import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from tests.monitoring.dashboards import NODES_ROW, PanelQuery, queries, substitute_variables
from tests.monitoring.prometheus_server import Exporter, Prometheus, dcgm_page, kube_state_page, require_command

from topwork.clients.prometheus.gpus import GpuCollector
from topwork.clients.prometheus.metrics import Metrics
from topwork.clients.prometheus.series import CHIEF_SERIES, MAX_NODE_SERIES, MAX_SERIES

NAMESPACE, TEAM = "ml", "vision"
GPUS = 2
"""GPUs of each run: both on one node, or one on each of two nodes."""
ONE, TWO = "one-0000000a", "two-0000000b"
PODS = {ONE: (f"{ONE}-abcde",), TWO: (f"{TWO}-0-abcde", f"{TWO}-1-abcde")}
MOVING_VALUES = ("Time since last progress", "Last checkpoint age", "Startup time")
"""Panels with a time of a few seconds, which depends on when a process was scraped."""
PULL_STARTED = datetime(2026, 5, 1, tzinfo=UTC)
NUMBER_OF_PODS = ("Pods", "Pods and restarts")
"""Panels that differ with the number of pods."""

pytestmark = pytest.mark.timeout(600)


def nvml(gpus: int) -> Any:
    """Return an NVML module with some busy GPUs."""
    return SimpleNamespace(
        NVMLError=RuntimeError,
        NVML_TEMPERATURE_GPU=0,
        nvmlDeviceGetCount=lambda: gpus,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetUtilizationRates=lambda gpu: SimpleNamespace(gpu=80),
        nvmlDeviceGetMemoryInfo=lambda gpu: SimpleNamespace(used=3e10, total=8e10),
        nvmlDeviceGetPowerUsage=lambda gpu: 250_000,
        nvmlDeviceGetTemperature=lambda gpu, sensor: 60,
    )


@dataclass
class Process:
    """A process of a run, which records what training records: the same steps on all nodes of the run."""

    run: str
    node: int
    nodes: int
    metrics: Metrics = field(init=False)

    def start(self, stages: ExitStack) -> None:
        """Begin to train."""
        self.metrics = Metrics(gpus=True)
        self.metrics.start_job(
            job=self.run[:3], run=self.run, stage="transfer", version="1.2.3", node=self.node, nodes=self.nodes
        )
        self.metrics.set_dataset_images(900)
        self.metrics.count_rejected_images("corrupt", 100)
        self.metrics.restore_stage("pull", PULL_STARTED, PULL_STARTED + timedelta(minutes=5))
        stages.enter_context(self.metrics.track_stage("transfer"))
        self.metrics.set_planned_epochs("transfer", 10)
        self.metrics.set_parameters(10, 90)
        self.metrics.set_replicas(GPUS)

    def train(self, step: int) -> None:
        """Record a step, a checkpoint and an evaluation. Node 1 is twice as slow as node 0."""
        metrics, share = self.metrics, GPUS // self.nodes
        metrics.record_step(images=64, seconds=0.2)
        metrics.record_step_time(0.1 if self.node == 0 else 0.06, 0.1 if self.node == 0 else 0.14)
        metrics.record_evaluation_speed(images=100 * share, seconds=(1.0 + self.node) * share)
        metrics.set_epoch("transfer", 1 + step // 20)
        metrics.set_learning_rate(0.001)
        for split in ("train", "validation", "test"):
            metrics.set_evaluation(split, {"loss": 0.5, "accuracy": 0.9})
        metrics.set_best_metric("transfer", "accuracy", "validation", 0.9)
        metrics.set_failed_gates(0)
        metrics.record_checkpoint(0.5)
        for direction in ("download", "upload"):
            metrics.count_storage_bytes(direction, 1000 * share)
        if step % self.nodes == self.node:
            metrics.count_storage_retry()


@contextmanager
def trained(processes: list[Process]) -> Iterator[None]:
    """Let all processes train in the background, in lockstep."""
    stop = threading.Event()

    def train() -> None:
        step = 0
        while not stop.wait(0.2):
            step += 1
            for process in processes:
                process.train(step)

    with ExitStack() as stages:
        for process in processes:
            process.start(stages)
        thread = threading.Thread(target=train)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


def page(metrics: Metrics) -> str:
    """Read the metrics page of a process."""
    with urllib.request.urlopen(f"http://127.0.0.1:{metrics.serve(0, '127.0.0.1')}/metrics", timeout=60) as response:
        return response.read().decode()


def target(address: str, pod: str) -> dict[str, Any]:
    """Return the scrape configuration of a process, with the labels of a PodMonitor."""
    labels = {"namespace": NAMESPACE, "pod": pod, "container": "transfer", "team": TEAM}
    return {"job_name": pod, "static_configs": [{"targets": [address], "labels": labels}]}


def cluster_configs(exporter: Exporter) -> list[dict[str, Any]]:
    """Return the scrape configurations of kube-state-metrics and DCGM for the pods of both runs."""
    for run, pods in PODS.items():
        gpus = GPUS // len(pods)
        exporter.pages[f"/kube/{run}"] = kube_state_page(NAMESPACE, run, *pods, complete=False, gpus=gpus)
        exporter.pages |= {f"/dcgm/{pod}": dcgm_page(NAMESPACE, pod, gpus) for pod in pods}
    return [
        {
            "job_name": path[1:],
            "metrics_path": path,
            "honor_labels": True,
            "static_configs": [{"targets": [exporter.address], "labels": {"machine": path}}],
        }
        for path in exporter.pages
    ]


@dataclass(frozen=True)
class ComparedRuns:
    """Two runs that do the same, on one and on two nodes, and the pages of their processes by pod."""

    prometheus: Prometheus
    start: float
    end: float
    pages: dict[str, str]

    def query(self, panel: PanelQuery, run: str) -> list[dict[str, Any]]:
        """Evaluate the query of a panel for a run at the end of the time range."""
        values = {
            "namespace": NAMESPACE,
            "team": TEAM,
            "transferjob": run[:3],
            "run": run,
            "__range": f"{int(self.end - self.start)}s",
            "__rate_interval": "10s",
        }
        return self.prometheus.query(substitute_variables(panel.expr, values), self.end)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComparedRuns]:
    require_command("prometheus")
    processes = [Process(ONE, 0, 1), Process(TWO, 0, 2), Process(TWO, 1, 2)]
    pods = [pod for run in (ONE, TWO) for pod in PODS[run]]
    exporter = Exporter()
    with pytest.MonkeyPatch.context() as patch:
        per_process = iter([GPUS, 1, 1])
        patch.setattr(
            "topwork.clients.prometheus.metrics.open_gpu_collector", lambda _: GpuCollector(nvml(next(per_process)))
        )
        start = time.time()
        with trained(processes):
            configs = [
                target(f"127.0.0.1:{process.metrics.serve(0, '127.0.0.1')}", pod)
                for process, pod in zip(processes, pods, strict=True)
            ]
            prometheus = Prometheus(tmp_path_factory.mktemp("nodes"), [*configs, *cluster_configs(exporter)])
            try:
                prometheus.wait_for(f'count_over_time(topwork_steps_total{{run="{TWO}"}}[1m]) >= 15', seconds=180)
                # GPU-hours are sampled at each full minute.
                time.sleep(62 - time.time() % 60)
                end = time.time()
                pages = {pod: page(process.metrics) for process, pod in zip(processes, pods, strict=True)}
                yield ComparedRuns(prometheus, start, end, pages)
            finally:
                prometheus.stop()
                exporter.stop()


COMPARED = [query for query in queries() if query.row not in {"Controller", "GPUs", NODES_ROW}]
COMPARED = [query for query in COMPARED if query.panel not in NUMBER_OF_PODS]


@pytest.mark.parametrize("panel", COMPARED, ids=[panel.name for panel in COMPARED])
def test_each_panel_shows_the_same_for_one_and_for_two_nodes(runs: ComparedRuns, panel: PanelQuery):
    one, two = (values_by_label(runs.query(panel, run)) for run in (ONE, TWO))
    # Scrapes at different times make rates differ. A value that is counted twice differs more.
    assert two == pytest.approx(one, rel=0.4, abs=5 if panel.panel in MOVING_VALUES else 1e-9)
    assert two


def values_by_label(result: list[dict[str, Any]]) -> dict[str, float]:
    """Return the values of a query by their labels, except for those that name the run."""
    values = {}
    for series in result:
        labels = {name: value for name, value in series["metric"].items() if name not in {"run", "transferjob"}}
        values[str(sorted(labels.items()))] = float(series["value"][1])
    assert len(values) == len(result)
    return values


def select(panel: str) -> list[PanelQuery]:
    return [query for query in queries() if query.panel == panel]


@pytest.mark.parametrize("panel", [query for query in queries() if query.row == "GPUs"], ids=lambda panel: panel.name)
def test_gpu_panels_show_each_gpu_of_each_node(runs: ComparedRuns, panel: PanelQuery):
    one, two = (runs.query(panel, run) for run in (ONE, TWO))
    assert len(one) == len(two) == GPUS
    assert {series["metric"]["gpu"] for series in one} == {"0", "1"}
    assert {series["metric"]["gpu"] for series in two} == {"0"}
    assert not [series for series in one if "of_node" in series["metric"]]
    if "topwork:dcgm" not in panel.expr:
        assert {series["metric"]["of_node"] for series in two} == {" of node 0", " of node 1"}
    else:
        assert {series["metric"]["pod"] for series in two} == set(PODS[TWO])


def test_pod_panels_show_the_pods_of_all_nodes(runs: ComparedRuns):
    (phases,), (pods, restarts) = select("Pods"), select("Pods and restarts")
    for run in (ONE, TWO):
        assert {series["metric"]["pod"] for series in runs.query(phases, run)} == set(PODS[run])
        assert float(runs.query(pods, run)[0]["value"][1]) == len(PODS[run])
        assert float(runs.query(restarts, run)[0]["value"][1]) == 0


def test_panels_that_compare_nodes_show_the_slow_node(runs: ComparedRuns):
    results = {query.panel: runs.query(query, TWO) for query in queries() if query.row == NODES_ROW}
    values = {
        panel: {series["metric"].get("node", ""): float(series["value"][1]) for series in result}
        for panel, result in results.items()
    }
    assert values.pop("Number of nodes") == {"": 2}
    assert values.pop("Nodes") == {"0": 1, "1": 1}
    # Node 1 takes two seconds for what takes node 0 one second: the median is 1.5.
    assert values.pop("Slowest node") == {"": pytest.approx(4 / 3, rel=0.1)}
    assert values.pop("Evaluation speed of each node") == {
        "0": pytest.approx(100, rel=0.1),
        "1": pytest.approx(50, rel=0.1),
    }
    assert values.pop("Input wait of each node") == {"0": pytest.approx(0.5, rel=0.1), "1": pytest.approx(0.3, rel=0.1)}
    assert values.pop("Step skew") == {"": pytest.approx(0.04, rel=0.4)}
    assert values == {}


def test_panels_that_compare_nodes_have_no_data_for_one_node(runs: ComparedRuns):
    assert [query.name for query in queries() if query.row == NODES_ROW and runs.query(query, ONE)] == []


def test_a_run_has_one_alert_whatever_its_number_of_nodes(runs: ComparedRuns):
    result = runs.prometheus.query(f'ALERTS{{run=~"{ONE}|{TWO}"}}', runs.end)
    alerts = [(series["metric"]["run"], series["metric"]["alertname"]) for series in result]
    expected = ["TopworkImagesRejected", "TopworkInputStarvesGpus", "TopworkStorageRetries"]
    assert sorted(alerts) == sorted(
        [(run, name) for run in (ONE, TWO) for name in expected] + [(TWO, "TopworkNodeSlow")]
    )
    assert {series["metric"]["node"] for series in result if "node" in series["metric"]} == {"1"}


def test_number_of_series_of_each_node_is_limited(runs: ComparedRuns):
    counts = {
        pod: sum(not line.startswith(("#", "topwork_gpu")) for line in text.splitlines())
        for pod, text in runs.pages.items()
    }
    (one,), (chief, other) = PODS[ONE], PODS[TWO]
    assert counts[one] <= MAX_SERIES
    assert counts[chief] == counts[one] + CHIEF_SERIES
    assert counts[other] <= MAX_NODE_SERIES


def test_rules_record_one_series_per_node_and_one_per_run_on_several_nodes(runs: ComparedRuns):
    one, two = (recorded_series(runs, run) for run in (ONE, TWO))
    assert two.pop("topwork:node_evaluation_time:seconds_per_image_rate30m") == 2
    assert two.pop("topwork:run_slowest_node:ratio_rate30m") == 1
    assert two.pop("topwork:pod_info") == one.pop("topwork:pod_info") + 1
    assert two == one


def recorded_series(runs: ComparedRuns, run: str) -> dict[str, int]:
    """Return the number of series of each recording rule."""
    query = f'count by (__name__) ({{__name__=~"topwork:.+", run="{run}"}})'
    return {series["metric"]["__name__"]: int(series["value"][1]) for series in runs.prometheus.query(query, runs.end)}


def test_metrics_pages_of_nodes_pass_promtool(runs: ComparedRuns):
    for text in runs.pages.values():
        command = [require_command("promtool"), "check", "metrics"]
        completed = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
        assert (completed.returncode, completed.stdout, completed.stderr) == (0, "", "")
