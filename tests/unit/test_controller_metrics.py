"""The metrics of the controller, as Prometheus scrapes them."""

from collections.abc import Mapping
from dataclasses import replace
from typing import get_args

import pytest
from prometheus_client.parser import text_string_to_metric_families

from topwork.clients.prometheus.controller import (
    MAX_SEARCH_SERIES,
    MAX_TRANSFERJOB_SERIES,
    STATES,
    ControllerMetrics,
    TransferJobSample,
    TransferSearchSample,
)
from topwork.cluster.transfer_job_status import State

CATS = TransferJobSample(
    namespace="ml",
    name="cats",
    run="cats-0f1e2d3c",
    state="Running",
    stage="transfer",
    model="",
    queue="team-a",
    gpus=2,
    created=1_000.0,
    started=1_010.5,
    completed=None,
    gpu_seconds=120.5,
    team="vision",
)
PUBLISHED = replace(
    CATS, state="Complete", stage="fine-tune", model="s3://ml/models/cats/3", completed=2_000.0, gpu_seconds=1_980.0
)
SERIES_OF_THE_CONTROLLER = {
    'topwork_controller_info{version="0.2.0"}': 1,
    "topwork_controller_leader": 1,
    'topwork_controller_reconciles_total{result="ok"}': 0,
    'topwork_controller_reconciles_total{result="error"}': 0,
    "topwork_controller_reconcile_duration_seconds_count": 0,
    "topwork_controller_reconcile_duration_seconds_sum": 0,
    "topwork_controller_queue_depth": 0,
    "topwork_controller_queue_oldest_seconds": 0,
}


def leader(*samples: TransferJobSample) -> ControllerMetrics:
    metrics = ControllerMetrics(lambda: samples, "0.2.0")
    metrics.set_leader(True)
    return metrics


def scrape(metrics: ControllerMetrics) -> dict[str, float]:
    """Return all series of the page except histogram buckets."""
    body, content_type = metrics.page()
    assert content_type == "text/plain; version=0.0.4; charset=utf-8"
    samples = [sample for family in text_string_to_metric_families(body.decode()) for sample in family.samples]
    return {
        series(sample.name, sample.labels): sample.value for sample in samples if not sample.name.endswith("_bucket")
    }


def series(name: str, labels: Mapping[str, str]) -> str:
    """Return the name and labels of a series as in the text format."""
    text = ",".join(f'{label}="{value}"' for label, value in sorted(labels.items()))
    return f"{name}{{{text}}}" if text else name


def of_cats(name: str, **labels: str) -> str:
    """Return a series of the TransferJob cats."""
    return series(f"topwork_transferjob_{name}", {"namespace": "ml", "transferjob": "cats"} | labels)


def of_transferjobs(metrics: ControllerMetrics) -> dict[str, float]:
    return {name: value for name, value in scrape(metrics).items() if name.startswith("topwork_transferjob_")}


def test_running_transferjob_has_its_documented_series():
    assert of_transferjobs(leader(CATS)) == {of_cats("state", state=state): 0 for state in STATES} | {
        of_cats("info", run="cats-0f1e2d3c", queue="team-a", model="", team="vision"): 1,
        of_cats("state", state="Running"): 1,
        of_cats("stage", stage="transfer"): 1,
        of_cats("created_timestamp_seconds"): 1_000.0,
        of_cats("started_timestamp_seconds"): 1_010.5,
        of_cats("gpus"): 2,
        of_cats("gpu_seconds_total"): 120.5,
    }


def test_finished_transferjob_has_its_end_its_model_and_the_maximum_number_of_series():
    exposed = of_transferjobs(leader(PUBLISHED))
    assert exposed[of_cats("completed_timestamp_seconds")] == 2_000.0
    assert any('model="s3://ml/models/cats/3"' in name for name in exposed)
    assert len(exposed) == MAX_TRANSFERJOB_SERIES


def test_transferjob_without_a_run_has_no_series_of_a_run():
    rejected = replace(CATS, run="", state="Failed", stage="", started=None)
    names = {name.partition("{")[0] for name in of_transferjobs(leader(rejected))}
    assert not names & {"topwork_transferjob_stage", "topwork_transferjob_started_timestamp_seconds"}


@pytest.mark.parametrize("state", STATES)
def test_each_state_of_the_api_has_exactly_one_active_series(state: str):
    exposed = of_transferjobs(leader(replace(CATS, state=state)))
    active = [name for name, value in exposed.items() if "_state{" in name and value == 1]
    assert active == [of_cats("state", state=state)]
    assert set(STATES) == set(get_args(State))


def test_deleted_transferjob_has_no_series():
    samples = [CATS, replace(CATS, name="dogs", run="dogs-11111111")]
    metrics = ControllerMetrics(lambda: samples, "0.2.0")
    metrics.set_leader(True)
    assert any('transferjob="cats"' in name for name in of_transferjobs(metrics))
    del samples[0]
    remaining = of_transferjobs(metrics)
    assert remaining
    assert not any('transferjob="cats"' in name for name in remaining)


def test_only_the_leader_exposes_transferjobs():
    metrics = ControllerMetrics(lambda: [CATS], "0.2.0")
    assert scrape(metrics) == SERIES_OF_THE_CONTROLLER | {"topwork_controller_leader": 0}
    metrics.set_leader(True)
    assert of_transferjobs(metrics)
    metrics.set_leader(False)
    assert scrape(metrics) == SERIES_OF_THE_CONTROLLER | {"topwork_controller_leader": 0}


def test_transfersearch_has_the_number_of_its_trials_and_its_best_value():
    search = TransferSearchSample("ml", "cats", {"running": 2, "complete": 5}, "f1", 0.75)
    metrics = ControllerMetrics(tuple, "0.2.0", lambda: [search])
    assert scrape(metrics) == SERIES_OF_THE_CONTROLLER | {"topwork_controller_leader": 0}
    metrics.set_leader(True)
    exposed = {name: value for name, value in scrape(metrics).items() if name.startswith("topwork_search_")}
    labels = {"namespace": "ml", "transfersearch": "cats"}
    counts = {"running": 2, "paused": 0, "complete": 5, "pruned": 0, "failed": 0}
    assert exposed == {
        series("topwork_search_trials", labels | {"state": state}): count for state, count in counts.items()
    } | {series("topwork_search_best", labels | {"name": "f1"}): 0.75}
    assert len(exposed) == MAX_SEARCH_SERIES


def test_controller_series_start_at_0():
    assert scrape(leader()) == SERIES_OF_THE_CONTROLLER


def test_reconciles_and_the_queue_are_reported():
    metrics = leader()
    metrics.observe_reconcile("ok", seconds=0.25)
    metrics.observe_reconcile("ok", seconds=0.5)
    metrics.observe_reconcile("error", seconds=2.0)
    metrics.set_queue(depth=3, oldest_seconds=41.5)
    assert scrape(metrics) == SERIES_OF_THE_CONTROLLER | {
        'topwork_controller_reconciles_total{result="ok"}': 2,
        'topwork_controller_reconciles_total{result="error"}': 1,
        "topwork_controller_reconcile_duration_seconds_count": 3,
        "topwork_controller_reconcile_duration_seconds_sum": 2.75,
        "topwork_controller_queue_depth": 3,
        "topwork_controller_queue_oldest_seconds": 41.5,
    }


def test_two_controllers_of_a_process_share_no_series():
    first, second = leader(), leader()
    first.observe_reconcile("ok", seconds=0.25)
    assert scrape(second)['topwork_controller_reconciles_total{result="ok"}'] == 0
