"""SIGTERM in every stage: the pod that the Job controller makes next goes on where the last one was stopped."""

import csv
import io

import pytest
from tests.image.conftest import example

from topwork.cluster.termination_message import TerminationMessage

pytestmark = [pytest.mark.image, pytest.mark.timeout(1800)]

# Epochs of milliseconds: enough of them that a stop can't come too late.
TRANSFER = {"train": "head", "epochs": 150, "batchSize": 10}
STEPS = [{"layers": 1, "epochs": 100, "learningRate": 1e-4}, {"layers": 2, "epochs": 50, "learningRate": 1e-5}]
DOWNLOADED = 'topwork_storage_bytes_total{direction="download"}'


@pytest.fixture
def job(solar, solar_base):
    """A run of its own on pictures that no run has pulled: those of the example but one."""
    *rows, _ = solar.read("pictures/poly.csv").decode().splitlines(keepends=True)
    solar.write("pictures/stopped.csv", "".join(rows).encode())
    source = {"table": {"uri": solar.uri_of("pictures/stopped.csv"), "image": "path", "label": "condition"}}
    splits = {"perClass": {"train": 10, "validation": 50, "test": 250}}
    return example(
        "solar-transfer",
        dataset={"source": source, "splits": splits, "imageSize": [96, 96]},
        transfer=TRANSFER,
        fineTune={"unfreeze": {"steps": STEPS}},
        evaluate={"metrics": ["accuracy"]},
        seed=7,
    )


@pytest.fixture
def next_pod(make_pod, job):
    """Make the pod of the next attempt, and run what stands before a stage: all of that is found done."""

    def make(stage):
        pod = make_pod(job)
        for earlier in pod.containers:
            if earlier == stage:
                return pod.start(stage)
            ended = pod.start(earlier).wait()
            assert ended.exit_code == 0, ended.log
            assert ended.lines("epoch") == []
        return None

    return make


def epochs(ended):
    return [line["epoch"] for line in ended.lines("epoch")]


def stopped(container, stage, run):
    """Stop a container as the kubelet would, and look at what it left; gives how it ended."""
    ended = container.stop()
    assert ended.exit_code == 143, ended.log
    assert ended.ending.model_copy(update={"error": None, "metric": None, "value": None, "epochs": None}) == TerminationMessage(
        stage=stage, outcome="stopped", exit_code=143, run=run
    )
    assert "Start the same job again to resume" in ended.ending.error
    assert "Traceback" not in ended.log
    assert ended.written == []
    return ended


def finished(container, stage, run):
    ended = container.wait()
    assert ended.exit_code == 0, ended.log
    assert (ended.ending.stage, ended.ending.outcome, ended.ending.run) == (stage, "done", run)
    return ended


def test_a_run_that_is_stopped_in_every_stage_trains_every_epoch_once(next_pod, job, solar):
    pulling = next_pod("pull")
    pulling.until_metrics(DOWNLOADED, at_least=1e6)
    stopped(pulling, "pull", job.run)
    finished(next_pod("pull"), "pull", job.run)

    trained = []
    for stage, planned in (("transfer", 150), ("fine-tune", 150)):
        container = next_pod(stage)
        container.until(lambda log: '"epoch": 5,' in log)
        first = stopped(container, stage, job.run)
        assert first.ending.epochs == len(epochs(first))
        second = finished(next_pod(stage), stage, job.run)
        assert epochs(first) + epochs(second) == list(range(1, planned + 1))
        assert second.ending.epochs == planned
        trained += [(stage, epoch) for epoch in range(1, planned + 1)]

    history = csv.DictReader(io.StringIO(solar.read(f"runs/{job.run}/history.csv").decode()))
    assert [(row["stage"], int(row["epoch"])) for row in history] == trained
