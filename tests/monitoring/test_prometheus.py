"""A real Prometheus server with a real run: dashboard queries have data, and series match the files of the run."""

import re
import subprocess
import time
from collections.abc import Mapping

import pytest
from tests.monitoring.conftest import NAMESPACE, TEAM, Controller, ObservedRun
from tests.monitoring.dashboards import NODES_ROW, PanelQuery, queries, substitute_variables, variables
from tests.monitoring.prometheus_server import Prometheus, require_command

# The first test waits for two training runs.
pytestmark = pytest.mark.timeout(1800)


ONE_NODE_QUERIES = [query for query in queries() if query.row != NODES_ROW]


@pytest.mark.parametrize("panel", ONE_NODE_QUERIES, ids=[panel.name for panel in ONE_NODE_QUERIES])
@pytest.mark.parametrize("all_runs", [False, True], ids=["this run", "all"])
def test_every_panel_query_has_data(observed_run: ObservedRun, panel: PanelQuery, all_runs: bool):
    values = (
        observed_run.values | dict.fromkeys(["namespace", "team", "transferjob"], ".*")
        if all_runs
        else observed_run.values
    )
    assert_has_data(observed_run, observed_run.prometheus, panel, values)


def test_panels_that_compare_nodes_have_no_data_for_a_run_on_one_node(observed_run: ObservedRun):
    for panel in queries():
        if panel.row == NODES_ROW:
            query = substitute_variables(panel.expr, observed_run.values)
            assert observed_run.prometheus.query_range(query, observed_run.start, observed_run.end) == [], panel.name


JOBS_QUERIES = [query for query in queries() if query.dashboard == "jobs.json"]


@pytest.mark.parametrize("panel", JOBS_QUERIES, ids=[panel.name for panel in JOBS_QUERIES])
def test_every_query_of_the_jobs_dashboard_has_data_without_kube_state_metrics(
    observed_run: ObservedRun, panel: PanelQuery
):
    assert_has_data(observed_run, observed_run.without_kube_state, panel, observed_run.values)


def assert_has_data(run: ObservedRun, prometheus: Prometheus, panel: PanelQuery, values: Mapping[str, str]) -> None:
    query = substitute_variables(panel.expr, values)
    if panel.instant:
        result = prometheus.query(query, run.end)
        assert [series["value"][1] for series in result if series["value"][1] != "NaN"], query
    else:
        result = prometheus.query_range(query, run.start, run.end)
        assert [value for series in result for _, value in series["values"] if value != "NaN"], query


@pytest.mark.parametrize(
    ("dashboard", "name", "query"),
    list(variables()),
    ids=[f"{dashboard} / {name}" for dashboard, name, _ in variables()],
)
def test_every_dashboard_variable_lists_the_run(observed_run: ObservedRun, dashboard: str, name: str, query: str):
    series, label = re.fullmatch(
        r"label_values\((.+), (\w+)\)", substitute_variables(query, observed_run.values)
    ).groups()
    result = observed_run.prometheus.api(
        f"label/{label}/values", **{"match[]": series, "start": observed_run.start, "end": observed_run.end}
    )
    expected = {"namespace": NAMESPACE, "team": TEAM, "transferjob": observed_run.transferjob, "run": observed_run.run}
    assert result == [expected[name]]


def test_counters_match_the_history(observed_run: ObservedRun):
    # Each epoch trains on ten images of each of the two classes, with a batch size of ten.
    images = 20 * len(observed_run.history)
    seconds = sum(float(row["seconds"]) for row in observed_run.history)
    run = f'{{run="{observed_run.run}"}}'
    assert observed_run.prometheus.value(f"topwork_images_total{run}", observed_run.end) == images
    assert observed_run.prometheus.value(f"topwork_steps_total{run}", observed_run.end) == images / 10
    assert observed_run.prometheus.value(f"topwork_step_duration_seconds_count{run}", observed_run.end) == images / 10
    assert observed_run.prometheus.value(f"topwork_step_duration_seconds_sum{run}", observed_run.end) == pytest.approx(
        seconds
    )


def test_loss_and_metrics_match_the_last_epoch(observed_run: ObservedRun):
    last = observed_run.history[-1]
    for series, column in (
        ('topwork_loss{split="train"}', "loss"),
        ('topwork_loss{split="validation"}', "validation_loss"),
        ('topwork_metric{split="train", name="accuracy"}', "accuracy"),
        ('topwork_metric{split="validation", name="accuracy"}', "validation_accuracy"),
        ("topwork_learning_rate", "learning_rate"),
    ):
        assert observed_run.prometheus.value(series, observed_run.end) == float(last[column]), series


def test_evaluation_series_match_metrics_json(observed_run: ObservedRun):
    expected = dict(observed_run.metrics["metrics"])
    assert observed_run.prometheus.value('topwork_loss{split="test"}', observed_run.end) == expected.pop("loss")
    result = observed_run.prometheus.query('topwork_metric{split="test"}', observed_run.end)
    assert {series["metric"]["name"]: float(series["value"][1]) for series in result} == expected


def test_last_stage_exposes_the_results_of_all_stages(observed_run: ObservedRun):
    values = {
        f'topwork_epoch{{stage="{stage}"}}': sum(row["stage"] == stage for row in observed_run.history)
        for stage in ("transfer", "fine-tune")
    }
    values |= {"topwork_replicas": 2, "topwork_gates_failed": 0, "topwork_dataset_images": 1322, "topwork_exit_code": 0}
    for series, value in values.items():
        assert observed_run.prometheus.value(series, observed_run.end) == value, series
    stages = observed_run.prometheus.query("topwork_stage_duration_seconds > 0", observed_run.end)
    assert sorted(series["metric"]["stage"] for series in stages) == ["fine-tune", "publish", "pull", "transfer"]


@pytest.mark.parametrize("server", ["prometheus", "without_kube_state"])
def test_run_is_counted_while_running_and_when_done(observed_run: ObservedRun, server: str):
    """These panels show 0 if no series match, so checking that they have data is not sufficient."""
    prometheus: Prometheus = getattr(observed_run, server)
    counts = {
        query.panel: substitute_variables(query.expr, observed_run.values)
        for query in queries()
        if query.dashboard == "jobs.json"
    }
    pending = prometheus.query_range(counts["Pending"], observed_run.start, observed_run.end)
    assert {value for _, value in pending[0]["values"]} == {"0", "1"}
    running = prometheus.query_range(counts["Running"], observed_run.start, observed_run.end)
    assert {value for _, value in running[0]["values"]} == {"0", "1"}
    assert prometheus.value(counts["Allocated GPUs"], observed_run.end) == 2
    prometheus.wait_for(f'topwork:run_state{{run="{observed_run.run}"}} == 3', seconds=120)
    assert prometheus.value(counts["Succeeded"]) == 1
    assert prometheus.value(counts["Failed"]) == 0


def test_no_alert_fires_for_a_successful_run(observed_run: ObservedRun):
    for prometheus in (observed_run.prometheus, observed_run.without_kube_state):
        assert prometheus.query_range('ALERTS{alertstate="firing"}', observed_run.start, observed_run.end) == []


def test_dcgm_series_have_the_run_of_their_pod(observed_run: ObservedRun):
    result = observed_run.prometheus.query("topwork:dcgm_gpu_memory_used:bytes", observed_run.end)
    assert {series["metric"]["gpu"]: series["metric"]["run"] for series in result} == {
        "0": observed_run.run,
        "1": observed_run.run,
    }
    assert {float(series["value"][1]) for series in result} == {30000 * 2**20}


def test_metrics_page_of_a_run_passes_promtool(observed_run: ObservedRun):
    assert_passes_promtool(observed_run.page)


def test_metrics_page_of_the_controller_passes_promtool():
    controller = Controller("cats", "cats-0000000a")
    controller.set_state("Complete", started=1.0, completed=2.0)
    assert_passes_promtool(controller.page())


def assert_passes_promtool(page: str) -> None:
    completed = subprocess.run(
        [require_command("promtool"), "check", "metrics"],
        input=page,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (completed.returncode, completed.stdout, completed.stderr) == (0, "", "")


def test_series_end_when_the_process_has_ended(observed_run: ObservedRun):
    time.sleep(2)
    assert observed_run.prometheus.query(f'topwork_steps_total{{run="{observed_run.run}"}}') == []
