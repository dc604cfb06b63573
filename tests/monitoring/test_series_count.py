"""Number of series per run with ten concurrent runs, as documented in docs/monitoring.md."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.monitoring.conftest import NAMESPACE, Controller, ObservedRun, scrape_configs
from tests.monitoring.prometheus_server import Exporter, Prometheus, dcgm_page, kube_state_page

from topwork.clients.prometheus.series import MAX_SERIES

RUNS = 10
RECORDED_SERIES = 16
"""Number of series from recording rules for a run of a TransferJob with two GPUs."""


@pytest.fixture
def ten_runs(observed_run: ObservedRun, tmp_path: Path) -> Iterator[Prometheus]:
    """Prometheus server that scrapes the last page of the real run as ten runs, and the exporters of a cluster."""
    exporter, configs = Exporter(), []
    for number in range(RUNS):
        run = f"{observed_run.transferjob}-0000000{number}"
        pod = f"{run}-abcde"
        pages = {
            "page": observed_run.page.replace(observed_run.run, run),
            "kube": kube_state_page(NAMESPACE, run, pod, complete=True),
            "dcgm": dcgm_page(NAMESPACE, pod),
            "controller": Controller(f"{observed_run.transferjob}-{number}", run).page,
        }
        exporter.pages |= {f"/{number}/{name}": page for name, page in pages.items()}
        for config in scrape_configs(exporter.address, 0, pod):
            names = {"topwork": "page", "kube-state-metrics": "kube", "dcgm": "dcgm", "controller": "controller"}
            if name := names.get(config["job_name"]):
                config |= {"job_name": f"{config['job_name']}-{number}", "metrics_path": f"/{number}/{name}"}
                config["static_configs"][0]["targets"] = [exporter.address]
                configs.append(config)
    prometheus = Prometheus(tmp_path / "prometheus", configs)
    yield prometheus
    prometheus.stop()
    exporter.stop()


def test_each_of_ten_runs_has_the_documented_number_of_series(ten_runs: Prometheus):
    ten_runs.wait_for(f"count(count by (run) (topwork:dcgm_gpu_power:watts)) == {RUNS}", seconds=180)
    ten_runs.wait_for(f"count(count by (run) (topwork:run_gpu_utilization:ratio)) == {RUNS}", seconds=180)
    # The page never changes, so the input wait ratio has no value. Rules of a group are evaluated one after the other.
    recorded = 'count by (run) ({__name__=~"topwork:.+"})'
    ten_runs.wait_for(f"count({recorded} == {RECORDED_SERIES - 1}) == {RUNS}", seconds=180)
    scraped = ten_runs.query('count by (run) ({job=~"topwork-.+", run!=""})')
    assert len(scraped) == RUNS
    assert max(int(series["value"][1]) for series in scraped) <= MAX_SERIES
