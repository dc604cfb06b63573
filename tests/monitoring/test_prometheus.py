"""What a real Prometheus has of a real run: every query gives data, and the figures are those of the run's files."""

import re
import subprocess
import time

import pytest
from tests.monitoring.conftest import NAMESPACE, TEAM, Watched
from tests.monitoring.panels import Asked, filled, queries, variables
from tests.monitoring.served import needed

# The first test waits for two trainings.
pytestmark = pytest.mark.timeout(1800)


@pytest.mark.parametrize("asked", list(queries()), ids=[asked.name for asked in queries()])
@pytest.mark.parametrize("everything", [False, True], ids=["this run", "all"])
def test_every_query_of_every_panel_gives_data(watched: Watched, asked: Asked, everything: bool):
    chosen = (
        watched.values | dict.fromkeys(["namespace", "team", "transferjob"], ".*") if everything else watched.values
    )
    query = filled(asked.expr, chosen)
    if asked.instant:
        found = watched.prometheus.now(query, watched.end)
        assert [series["value"][1] for series in found if series["value"][1] != "NaN"], query
    else:
        found = watched.prometheus.over(query, watched.start, watched.end)
        assert [value for series in found for _, value in series["values"] if value != "NaN"], query


@pytest.mark.parametrize(
    ("board", "name", "query"), list(variables()), ids=[f"{board} / {name}" for board, name, _ in variables()]
)
def test_every_variable_offers_what_was_seen(watched: Watched, board: str, name: str, query: str):
    series, label = re.fullmatch(r"label_values\((.+), (\w+)\)", filled(query, watched.values)).groups()
    found = watched.prometheus.ask(
        f"label/{label}/values", **{"match[]": series, "start": watched.start, "end": watched.end}
    )
    expected = {"namespace": NAMESPACE, "team": TEAM, "transferjob": watched.transferjob, "run": watched.run}
    assert found == [expected[name]]


def test_the_counters_are_those_of_the_history(watched: Watched):
    # Each epoch trains on ten images of each of two classes, in steps of ten.
    images = 20 * len(watched.history)
    seconds = sum(float(row["seconds"]) for row in watched.history)
    run = f'{{run="{watched.run}"}}'
    assert watched.prometheus.value(f"topwork_images_total{run}", watched.end) == images
    assert watched.prometheus.value(f"topwork_steps_total{run}", watched.end) == images / 10
    assert watched.prometheus.value(f"topwork_step_duration_seconds_count{run}", watched.end) == images / 10
    assert watched.prometheus.value(f"topwork_step_duration_seconds_sum{run}", watched.end) == pytest.approx(seconds)


def test_loss_and_metric_are_those_of_the_last_epoch(watched: Watched):
    last = watched.history[-1]
    for series, column in (
        ('topwork_loss{split="train"}', "loss"),
        ('topwork_loss{split="validation"}', "validation_loss"),
        ('topwork_metric{split="train", name="accuracy"}', "accuracy"),
        ('topwork_metric{split="validation", name="accuracy"}', "validation_accuracy"),
        ("topwork_learning_rate", "learning_rate"),
    ):
        assert watched.prometheus.value(series, watched.end) == float(last[column]), series


def test_the_evaluation_is_that_of_metrics_json(watched: Watched):
    measured = dict(watched.metrics["metrics"])
    assert watched.prometheus.value('topwork_loss{split="test"}', watched.end) == measured.pop("loss")
    found = watched.prometheus.now('topwork_metric{split="test"}', watched.end)
    assert {series["metric"]["name"]: float(series["value"][1]) for series in found} == measured


def test_the_last_stage_ends_with_the_whole_run_told(watched: Watched):
    values = {
        f'topwork_epoch{{stage="{stage}"}}': sum(row["stage"] == stage for row in watched.history)
        for stage in ("transfer", "fine-tune")
    }
    values |= {"topwork_replicas": 2, "topwork_gates_failed": 0, "topwork_dataset_images": 1322, "topwork_exit_code": 0}
    for series, value in values.items():
        assert watched.prometheus.value(series, watched.end) == value, series
    stages = watched.prometheus.now("topwork_stage_duration_seconds > 0", watched.end)
    assert sorted(series["metric"]["stage"] for series in stages) == ["fine-tune", "publish", "pull", "transfer"]


def test_a_run_is_counted_while_it_runs_and_when_it_is_done(watched: Watched):
    """These panels show 0 where nothing is found, so that data alone proves nothing of them."""
    counts = {asked.panel: filled(asked.expr, watched.values) for asked in queries() if asked.board == "jobs.json"}
    seen = watched.prometheus.over(counts["Running"], watched.start, watched.end)
    assert {value for _, value in seen[0]["values"]} == {"0", "1"}
    assert watched.prometheus.value(counts["GPUs held"], watched.end) == 2
    watched.prometheus.until(f'topwork:run_state{{run="{watched.run}"}} == 3', seconds=120)
    assert watched.prometheus.value(counts["Done"]) == 1
    assert watched.prometheus.value(counts["Failed"]) == 0


def test_no_alert_fires_on_a_good_run(watched: Watched):
    assert watched.prometheus.over('ALERTS{alertstate="firing"}', watched.start, watched.end) == []


def test_a_gpu_of_dcgm_is_known_by_the_pod_that_holds_it(watched: Watched):
    found = watched.prometheus.now("topwork:dcgm_gpu_memory_used:bytes", watched.end)
    assert {series["metric"]["gpu"]: series["metric"]["run"] for series in found} == {
        "0": watched.run,
        "1": watched.run,
    }
    assert {float(series["value"][1]) for series in found} == {30000 * 2**20}


def test_the_page_pleases_promtool(watched: Watched):
    checked = subprocess.run(
        [needed("promtool"), "check", "metrics"], input=watched.page, capture_output=True, text=True, check=False
    )
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")


def test_nobody_answers_any_more_and_the_series_end(watched: Watched):
    time.sleep(2)
    assert watched.prometheus.now(f'topwork_steps_total{{run="{watched.run}"}}') == []
