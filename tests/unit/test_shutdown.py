"""The end of a process: exit code in the metrics, Pushgateway, and the wait for a last scrape."""

import os
import signal
import threading
import time

import pytest
from structlog.testing import capture_logs

from topwork.cli.runtime.shutdown import push_to_pushgateway, record_outcome, wait_for_last_scrape
from topwork.clients.prometheus.metrics import Metrics
from topwork.errors import GateError, Stopped
from topwork.spec import TransferJob

UNREACHABLE = "http://127.0.0.1:9"


def make_job(**metrics: object) -> TransferJob:
    spec = {
        "storage": "s3://bucket/prefix",
        "dataset": {
            "source": {"tfds": "cats_vs_dogs"},
            "splits": {"train": "train[:80%]", "test": "train[80%:]"},
            "imageSize": [96, 96],
        },
        "model": {"base": {"application": "Xception"}},
        "metrics": metrics,
    }
    content = {"apiVersion": "topwork.dev/v1alpha1", "kind": "TransferJob", "metadata": {"name": "cats"}, "spec": spec}
    return TransferJob.model_validate(content)


def exit_code(metrics: Metrics) -> float | None:
    return metrics.registry.get_sample_value("topwork_exit_code", {"stage": "run"})


def send_sigterm_after(seconds: float) -> None:
    threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGTERM)).start()


@pytest.mark.parametrize(
    ("error", "code"), [(None, 0), (GateError("no"), 3), (KeyboardInterrupt(), 143), (RuntimeError("a bug"), 1)]
)
def test_run_records_its_exit_code_in_the_metrics(error, code):
    metrics = Metrics()
    with capture_logs() as lines:
        if error is None:
            with record_outcome(make_job(), metrics, served=True):
                assert exit_code(metrics) is None
        else:
            with pytest.raises(type(error)), record_outcome(make_job(), metrics, served=True):
                raise error
    assert exit_code(metrics) == code
    assert lines == []


def test_metrics_port_stays_open_after_a_failure_until_a_stop_request():
    started = time.monotonic()
    send_sigterm_after(0.3)
    with (
        capture_logs() as lines,
        pytest.raises(GateError),
        record_outcome(make_job(lingerSeconds=60), Metrics(), served=True),
    ):
        raise GateError("no")
    assert 0.3 <= time.monotonic() - started < 10
    assert lines == [{"event": "metrics port stays open", "log_level": "info", "seconds": 60, "exit_code": 3}]


def test_stop_request_while_the_metrics_port_stays_open_prevents_the_next_job():
    send_sigterm_after(0.1)
    with pytest.raises(Stopped), record_outcome(make_job(lingerSeconds=60), Metrics(), served=True):
        pass


@pytest.mark.parametrize(("served", "error"), [(False, None), (True, Stopped("stopped"))])
def test_run_does_not_wait_without_a_port_or_after_a_stop(served, error):
    started = time.monotonic()
    try:
        with record_outcome(make_job(lingerSeconds=60), Metrics(), served=served):
            if error:
                raise error
    except Stopped as raised:
        assert raised is error
    assert time.monotonic() - started < 5


def test_wait_for_last_scrape_ends_on_time_and_restores_signal_handlers():
    before = signal.getsignal(signal.SIGTERM)
    assert wait_for_last_scrape(0.05) is False
    assert signal.getsignal(signal.SIGTERM) is before


def test_unreachable_pushgateway_is_logged():
    with capture_logs() as lines:
        push_to_pushgateway(make_job(pushgateway=UNREACHABLE), Metrics())
    (line,) = lines
    assert (line["event"], line["log_level"]) == ("outcome not pushed", "warning")
    assert line["reason"].startswith(f"The Pushgateway {UNREACHABLE} can't be reached: ")


def test_job_without_a_pushgateway_pushes_nothing():
    with capture_logs() as lines:
        push_to_pushgateway(make_job(), Metrics())
    assert lines == []
