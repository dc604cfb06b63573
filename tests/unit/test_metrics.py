"""The metrics of a run, as Prometheus scrapes them."""

import time
import urllib.request
from datetime import UTC, datetime, timedelta
from typing import get_args

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics

from topwork.clients.prometheus.metrics import Metrics, StageProgress, serve_empty_page
from topwork.clients.prometheus.series import CHIEF_SERIES, MAX_NODE_SERIES, MAX_SERIES
from topwork.data.images.image_validation import REASONS
from topwork.spec.evaluation import MetricName


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def scrape(metrics: Metrics, **headers: str) -> str:
    port = metrics.serve(0, "127.0.0.1")
    request = urllib.request.Request(f"http://127.0.0.1:{port}/metrics", headers=headers)
    with urllib.request.urlopen(request, timeout=60) as response:
        return response.read().decode()


def test_record_step_counts_images_and_durations():
    metrics = Metrics()
    metrics.record_step(images=64, seconds=0.2)
    metrics.record_step(images=64, seconds=0.4)
    metrics.record_step_time(input_wait_seconds=0.05, compute_seconds=0.55)
    assert value(metrics, "topwork_steps_total") == 2
    assert value(metrics, "topwork_images_total") == 128
    assert value(metrics, "topwork_step_duration_seconds_sum") == pytest.approx(0.6)
    assert value(metrics, "topwork_input_wait_seconds_total") == pytest.approx(0.05)
    assert value(metrics, "topwork_step_compute_seconds_total") == pytest.approx(0.55)


def test_stage_is_running_until_it_ends_or_fails():
    metrics = Metrics()
    with pytest.raises(RuntimeError), metrics.track_stage("transfer"):
        assert value(metrics, "topwork_stage_running", stage="transfer") == 1
        raise RuntimeError
    assert value(metrics, "topwork_stage_running", stage="transfer") == 0
    assert value(metrics, "topwork_stage_duration_seconds", stage="transfer") > 0


def test_two_metrics_objects_share_no_series():
    first, second = Metrics(), Metrics()
    first.set_loss("train", 0.5)
    assert value(first, "topwork_loss", split="train") == 0.5
    assert value(second, "topwork_loss", split="train") is None


def test_start_job_drops_the_series_of_the_previous_job():
    metrics = Metrics()
    metrics.start_job(job="cats", run="cats-12345678", stage="run", version="0.1.0")
    metrics.set_loss("train", 0.5)
    metrics.record_step(images=64, seconds=0.2)
    metrics.set_exit_code("run", 3)
    first = scrape(metrics)
    assert 'topwork_loss{run="cats-12345678",split="train",transferjob="cats"} 0.5' in first
    metrics.start_job(job="dogs", run="dogs-87654321", stage="run", version="0.1.0")
    second = scrape(metrics)
    assert "cats" not in second
    assert "topwork_loss{" not in second
    assert "topwork_exit_code{" not in second
    assert 'topwork_steps_total{run="dogs-87654321",transferjob="dogs"} 0.0' in second


def test_series_of_a_search_remain_when_its_next_trial_starts():
    metrics = Metrics(gpus=False)
    assert "topwork_search" not in scrape(metrics)
    metrics.set_search("digits", {"complete": 2, "failed": 1}, "accuracy", 0.75)
    metrics.start_job(job="digits-3", run="digits-3-12345678", stage="run", version="0.1.0")
    lines = [line for line in scrape(metrics).splitlines() if line.startswith("topwork_search")]
    assert lines == [
        'topwork_search_trials{state="running",transfersearch="digits"} 0.0',
        'topwork_search_trials{state="paused",transfersearch="digits"} 0.0',
        'topwork_search_trials{state="complete",transfersearch="digits"} 2.0',
        'topwork_search_trials{state="pruned",transfersearch="digits"} 0.0',
        'topwork_search_trials{state="failed",transfersearch="digits"} 1.0',
        'topwork_search_best{name="accuracy",transfersearch="digits"} 0.75',
    ]


def test_gauges_are_absent_and_counters_are_0_at_the_start():
    metrics = Metrics(gpus=False)
    metrics.start_job(job="cats", run="cats-12345678", stage="pull", version="0.1.0")
    lines = scrape(metrics).splitlines()
    values = {line.split("{")[0]: line.rsplit(" ", 1)[1] for line in lines if not line.startswith("#")}
    assert values.pop("topwork_stage_info") == "1.0"
    assert time.time() - float(values.pop("topwork_last_progress_timestamp_seconds")) < 5
    assert set(values.values()) == {"0.0"}
    assert values.keys() == {
        "topwork_checkpoints_total",
        "topwork_images_total",
        "topwork_input_wait_seconds_total",
        "topwork_loss_not_finite_total",
        "topwork_step_compute_seconds_total",
        "topwork_step_duration_seconds_bucket",
        "topwork_step_duration_seconds_count",
        "topwork_step_duration_seconds_sum",
        "topwork_steps_total",
        "topwork_storage_bytes_total",
        "topwork_storage_retries_total",
    }


def test_stage_times_of_an_earlier_process_are_kept():
    metrics, started = Metrics(), datetime(2026, 5, 1, tzinfo=UTC)
    with metrics.track_stage("transfer"):
        metrics.restore_stage("transfer", started, started + timedelta(minutes=5))
    assert value(metrics, "topwork_stage_duration_seconds", stage="transfer") == 300
    assert value(metrics, "topwork_stage_start_timestamp_seconds", stage="transfer") == started.timestamp()
    with metrics.track_stage("fine-tune"):
        metrics.set_stage_start("fine-tune", datetime.now(UTC) - timedelta(hours=1))
    assert value(metrics, "topwork_stage_duration_seconds", stage="fine-tune") == pytest.approx(3600, abs=5)


def test_openmetrics_is_served_with_units_on_request():
    metrics = Metrics()
    metrics.start_job(job="cats", run="cats-12345678", stage="run", version="0.1.0")
    text = scrape(metrics, Accept="application/openmetrics-text; version=1.0.0")
    families = {family.name: family for family in openmetrics(text)}
    assert families["topwork_step_duration_seconds"].unit == "seconds"
    assert families["topwork_storage_bytes"].unit == "bytes"
    assert text.endswith("# EOF\n")
    assert "_created" not in text


def metrics_with_every_series(node: int = 0, nodes: int = 1) -> Metrics:
    metrics = Metrics(gpus=False)
    metrics.start_job(job="cats", run="cats-12345678", stage="run", version="0.1.0", node=node, nodes=nodes)
    metrics.init_rejection_reasons(REASONS)
    for stage in ("pull", "transfer", "fine-tune", "publish"):
        with metrics.track_stage(stage):
            pass
    for stage in ("transfer", "fine-tune"):
        metrics.set_planned_epochs(stage, 2)
        metrics.set_epoch(stage, 1)
        metrics.set_best_metric(stage, "accuracy", "validation", 0.5)
    metrics.set_evaluation("train", {"accuracy": 0.5, "loss": 0.5})
    metrics.set_evaluation("validation", {"accuracy": 0.5, "auc": 0.5, "loss": 0.5})
    metrics.set_evaluation("test", dict.fromkeys([*get_args(MetricName), "loss"], 0.5))
    metrics.set_learning_rate(0.1)
    metrics.set_parameters(1, 2)
    metrics.set_replicas(2)
    metrics.set_dataset_images(100)
    metrics.set_leaked_images(1)
    metrics.set_label_issues(1)
    metrics.set_failed_gates(0)
    metrics.record_checkpoint(1.0)
    metrics.set_exit_code("run", 0)
    metrics.record_step(images=64, seconds=0.2)
    metrics.record_step_time(input_wait_seconds=0.05, compute_seconds=0.15)
    metrics.record_evaluation_speed(images=100, seconds=2.0)
    metrics.count_storage_bytes("download", 10)
    return metrics


def exposed_lines(metrics: Metrics) -> list[str]:
    return [line for line in scrape(metrics).splitlines() if not line.startswith("#")]


def test_number_of_series_of_a_process_is_limited():
    """docs/metrics.md documents these limits."""
    assert len(exposed_lines(metrics_with_every_series())) == MAX_SERIES
    assert len(exposed_lines(metrics_with_every_series(nodes=64))) == MAX_SERIES + CHIEF_SERIES
    assert len(exposed_lines(metrics_with_every_series(node=63, nodes=64))) == MAX_NODE_SERIES


def test_a_single_node_exposes_neither_the_node_nor_its_evaluation_speed():
    text = "\n".join(exposed_lines(metrics_with_every_series()))
    assert "node" not in text
    assert "topwork_evaluation" not in text


def test_every_series_of_several_nodes_has_the_node():
    for node in (0, 1):
        lines = exposed_lines(metrics_with_every_series(node=node, nodes=2))
        assert all(f'node="{node}"' in line and 'run="cats-12345678"' in line for line in lines), lines


def test_node_0_exposes_the_number_of_nodes_and_its_evaluation_speed():
    metrics = metrics_with_every_series(nodes=2)
    assert value(metrics, "topwork_nodes") == 2
    metrics.record_evaluation_speed(images=50, seconds=1.0)
    assert value(metrics, "topwork_evaluation_images_total") == 150
    assert value(metrics, "topwork_evaluation_seconds_total") == 3


def test_other_nodes_expose_no_result_of_the_run():
    names = {line.split("{")[0] for line in exposed_lines(metrics_with_every_series(node=1, nodes=2))}
    assert names == {
        "topwork_evaluation_images_total",
        "topwork_evaluation_seconds_total",
        "topwork_input_wait_seconds_total",
        "topwork_stage_info",
        "topwork_stage_running",
        "topwork_step_compute_seconds_total",
        "topwork_storage_bytes_total",
        "topwork_storage_retries_total",
    }


def test_other_nodes_keep_their_progress_for_the_termination_message():
    assert metrics_with_every_series(node=1, nodes=2).stage_progress("transfer") == StageProgress(
        1, "validation_accuracy", 0.5
    )


def test_the_outcome_of_several_nodes_comes_from_node_0_and_has_no_node():
    chief, other = metrics_with_every_series(nodes=2), metrics_with_every_series(node=1, nodes=2)
    samples = [sample for family in chief.outcome_registry.collect() for sample in family.samples]
    assert samples
    assert not [sample for sample in samples if "node" in sample.labels]
    assert list(other.outcome_registry.collect()) == []
    assert chief.labels == other.labels == {"transferjob": "cats", "run": "cats-12345678"}


def test_port_serves_all_series_with_help_and_type():
    metrics = Metrics()
    metrics.start_job(job="cats", run="cats-12345678", stage="transfer", version="0.1.0")
    metrics.set_parameters(trainable=10, frozen=90)
    text = scrape(metrics)
    job = 'transferjob="cats"'
    assert f'topwork_stage_info{{gpus="0",run="cats-12345678",stage="transfer",{job},version="0.1.0"}} 1.0' in text
    assert f'topwork_parameters{{run="cats-12345678",trainable="false",{job}}} 90.0' in text
    assert "# TYPE topwork_step_duration_seconds histogram" in text
    assert "# HELP topwork_steps_total Training steps completed by this process." in text


def test_serve_empty_page_serves_no_series():
    with urllib.request.urlopen(f"http://127.0.0.1:{serve_empty_page(0, '127.0.0.1')}/metrics", timeout=60) as response:
        assert (response.status, response.read()) == (200, b"")


def test_serve_fails_if_the_port_is_in_use():
    metrics = Metrics()
    port = metrics.serve(0, "127.0.0.1")
    with pytest.raises(OSError, match="in use"):
        Metrics().serve(port, "127.0.0.1")


def test_stage_progress_returns_epochs_and_best_metric():
    metrics = Metrics()
    assert metrics.stage_progress("transfer") == StageProgress(None, None, None)
    metrics.set_epoch("transfer", 4)
    metrics.set_best_metric("transfer", "accuracy", "train", 0.5)
    metrics.set_epoch("fine-tune", 1)
    metrics.set_best_metric("fine-tune", "accuracy", "validation", 0.75)
    assert metrics.stage_progress("transfer") == StageProgress(4, "accuracy", 0.5)
    assert metrics.stage_progress("fine-tune") == StageProgress(1, "validation_accuracy", 0.75)
    assert metrics.stage_progress("pull") == StageProgress(None, None, None)
