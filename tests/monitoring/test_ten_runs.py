"""Ten runs at once: what one Prometheus has to keep for each, as docs/monitoring.md states it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.monitoring.conftest import NAMESPACE, Watched, scrape_configs
from tests.monitoring.served import Exporter, Prometheus, dcgm, kube_state

from topwork.clients.prometheus.series import MAX_SERIES

RUNS = 10
RECORDED = 15
"""Series of the recording rules for a run with two GPUs."""


@pytest.fixture
def ten_runs(watched: Watched, tmp_path: Path) -> Iterator[Prometheus]:
    """Scrapes the last page of the real run ten times, each under another name, and what a cluster tells of them."""
    exporter, configs = Exporter(), []
    for number in range(RUNS):
        run = f"{watched.transferjob}-0000000{number}"
        pod = f"{run}-abcde"
        pages = {
            "page": watched.page.replace(watched.run, run),
            "kube": kube_state(NAMESPACE, run, pod, complete=True),
            "dcgm": dcgm(NAMESPACE, pod),
        }
        exporter.pages |= {f"/{number}/{name}": text for name, text in pages.items()}
        for config in scrape_configs(exporter.address, 0, pod):
            name = {"topwork": "page", "kube-state-metrics": "kube", "dcgm": "dcgm"}.get(config["job_name"])
            if name:
                config |= {"job_name": f"{config['job_name']}-{number}", "metrics_path": f"/{number}/{name}"}
                config["static_configs"][0]["targets"] = [exporter.address]
                configs.append(config)
    prometheus = Prometheus(tmp_path / "prometheus", configs)
    yield prometheus
    prometheus.stop()
    exporter.stop()


def test_ten_runs_have_ten_times_the_series_that_the_docs_state(ten_runs: Prometheus):
    ten_runs.until(f"count(count by (run) (topwork:dcgm_gpu_power:watts)) == {RUNS}", seconds=180)
    ten_runs.until(f"count(count by (run) (topwork:run_gpu_utilization:ratio)) == {RUNS}", seconds=180)
    scraped = ten_runs.now('count by (run) ({job=~"topwork-.+", run!=""})')
    recorded = ten_runs.now('count by (run) ({__name__=~"topwork:.+"})')
    assert (len(scraped), len(recorded)) == (RUNS, RUNS)
    assert max(int(series["value"][1]) for series in scraped) <= MAX_SERIES
    # A page that stands still has no rate of input wait.
    assert {int(series["value"][1]) for series in recorded} == {RECORDED - 1}
