"""How a process of `topwork run` and a container take leave of who watches their metrics."""

import os
import signal
import threading
import time

import pytest

from topwork.cli.runtime.shutdown import hand_over, linger, parting
from topwork.clients.prometheus.metrics import Metrics
from topwork.errors import GateError, Stopped
from topwork.spec import TransferJob

GONE = "http://127.0.0.1:9"


class Told:
    """Keeps what is said."""

    def __init__(self) -> None:
        self.notes = []

    def note(self, message, **facts):
        self.notes.append((message, facts))


def job(**metrics: object) -> TransferJob:
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


def ask_to_stop(seconds: float) -> None:
    threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGTERM)).start()


@pytest.mark.parametrize(
    ("error", "code"), [(None, 0), (GateError("no"), 3), (KeyboardInterrupt(), 143), (RuntimeError("a bug"), 1)]
)
def test_the_exit_code_of_a_run_is_shown_however_it_ends(error, code):
    metrics, told = Metrics(), Told()
    if error is None:
        with parting(job(), metrics, told, served=True):
            assert exit_code(metrics) is None
    else:
        with pytest.raises(type(error)), parting(job(), metrics, told, served=True):
            raise error
    assert exit_code(metrics) == code
    assert told.notes == []


def test_the_port_stays_open_after_a_failure_until_somebody_asks_to_stop():
    told, began = Told(), time.monotonic()
    ask_to_stop(0.3)
    with pytest.raises(GateError), parting(job(lingerSeconds=60), Metrics(), told, served=True):
        raise GateError("no")
    assert 0.3 <= time.monotonic() - began < 10
    assert told.notes == [("metrics stay open", {"seconds": 60, "exit_code": 3})]


def test_who_asks_to_stop_while_a_port_stays_open_wants_no_other_job():
    ask_to_stop(0.1)
    with pytest.raises(Stopped), parting(job(lingerSeconds=60), Metrics(), Told(), served=True):
        pass


@pytest.mark.parametrize(("served", "error"), [(False, None), (True, Stopped("stopped"))])
def test_nobody_waits_without_a_port_or_after_a_stop(served, error):
    began = time.monotonic()
    try:
        with parting(job(lingerSeconds=60), Metrics(), Told(), served=served):
            if error:
                raise error
    except Stopped as raised:
        assert raised is error
    assert time.monotonic() - began < 5


def test_lingering_ends_by_itself_and_leaves_the_signals_as_they_were():
    before = signal.getsignal(signal.SIGTERM)
    assert linger(0.05) is False
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_pushgateway_that_is_away_costs_a_line():
    told = Told()
    hand_over(job(pushgateway=GONE), Metrics(), told)
    ((message, facts),) = told.notes
    assert message == "outcome not pushed"
    assert facts["reason"].startswith(f"The Pushgateway {GONE} can't be reached: ")


def test_a_job_without_a_pushgateway_pushes_nothing():
    told = Told()
    hand_over(job(), Metrics(), told)
    assert told.notes == []
