"""What Prometheus sees of a run."""

import urllib.request

import pytest

from topwork.edge.metrics import Metrics, Reached


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def test_a_step_counts_images_time_and_wait():
    metrics = Metrics()
    metrics.step(images=64, seconds=0.2)
    metrics.step(images=64, seconds=0.4)
    metrics.spent(input_wait_seconds=0.05, compute_seconds=0.55)
    assert value(metrics, "topwork_steps_total") == 2
    assert value(metrics, "topwork_images_total") == 128
    assert value(metrics, "topwork_step_duration_seconds_sum") == pytest.approx(0.6)
    assert value(metrics, "topwork_input_wait_seconds_total") == pytest.approx(0.05)
    assert value(metrics, "topwork_step_compute_seconds_total") == pytest.approx(0.55)


def test_a_stage_is_running_until_it_ends_however_it_ends():
    metrics = Metrics()
    with pytest.raises(RuntimeError), metrics.stage("transfer"):
        assert value(metrics, "topwork_stage_running", stage="transfer") == 1
        raise RuntimeError
    assert value(metrics, "topwork_stage_running", stage="transfer") == 0
    assert value(metrics, "topwork_stage_duration_seconds", stage="transfer") > 0


def test_two_runs_in_one_process_share_no_series():
    first, second = Metrics(), Metrics()
    first.loss("train", 0.5)
    assert value(first, "topwork_loss", split="train") == 0.5
    assert value(second, "topwork_loss", split="train") is None


def test_the_port_serves_all_series_with_help_and_type():
    metrics = Metrics()
    metrics.describe(job="cats", run="cats-12345678", stage="transfer", version="0.1.0")
    metrics.parameters(trainable=10, frozen=90)
    port = metrics.serve(0, "127.0.0.1")
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        text = answer.read().decode()
    job = 'transferjob="cats"'
    assert f'topwork_stage_info{{gpus="0",run="cats-12345678",stage="transfer",{job},version="0.1.0"}} 1.0' in text
    assert f'topwork_parameters{{run="cats-12345678",trainable="false",{job}}} 90.0' in text
    assert "# TYPE topwork_step_duration_seconds histogram" in text
    assert "# HELP topwork_steps_total Training steps done by this process." in text


def test_a_taken_port_is_an_error():
    metrics = Metrics()
    port = metrics.serve(0, "127.0.0.1")
    with pytest.raises(OSError, match="in use"):
        Metrics().serve(port, "127.0.0.1")


def test_how_far_a_stage_has_come_can_be_asked_for():
    metrics = Metrics()
    assert metrics.reached("transfer") == Reached(None, None, None)
    metrics.epoch("transfer", 4)
    metrics.best("transfer", "accuracy", "train", 0.5)
    metrics.epoch("fine-tune", 1)
    metrics.best("fine-tune", "accuracy", "validation", 0.75)
    assert metrics.reached("transfer") == Reached(4, "accuracy", 0.5)
    assert metrics.reached("fine-tune") == Reached(1, "validation_accuracy", 0.75)
    assert metrics.reached("pull") == Reached(None, None, None)
