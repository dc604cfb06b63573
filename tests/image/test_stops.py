"""SIGTERM in each stage: the next pod of the Job resumes where the previous one was stopped."""

import csv
import io

import pytest
from tests.image.conftest import read_fixture_job

from topwork.cli.runtime.eviction import FREE_SHARE
from topwork.cluster.termination_message import TerminationMessage

pytestmark = [pytest.mark.image, pytest.mark.timeout(1800)]

# Epochs take milliseconds. With this many, the stage is still running when the signal arrives.
TRANSFER = {"train": "head", "epochs": 150, "batchSize": 10}
STEPS = [{"layers": 1, "epochs": 100, "learningRate": 1e-4}, {"layers": 2, "epochs": 50, "learningRate": 1e-5}]
DOWNLOADED_BYTES = 'topwork_storage_bytes_total{direction="download"}'


@pytest.fixture
def job(solar, solar_base):
    """A job with a dataset that no other test has pulled: the images of solar-transfer except one."""
    *rows, _ = solar.read("pictures/poly.csv").decode().splitlines(keepends=True)
    solar.write("pictures/stopped.csv", "".join(rows).encode())
    source = {"table": {"uri": solar.uri_of("pictures/stopped.csv"), "image": "path", "label": "condition"}}
    splits = {"perClass": {"train": 10, "validation": 50, "test": 250}}
    return read_fixture_job(
        "solar-transfer",
        dataset={"source": source, "splits": splits, "imageSize": [96, 96]},
        transfer=TRANSFER,
        fineTune={"unfreeze": {"steps": STEPS}},
        evaluate={"metrics": ["accuracy"]},
        seed=7,
    )


@pytest.fixture
def start_in_next_pod(make_pod, job):
    """Function that creates the pod of the next attempt and starts a stage, after the completed earlier stages."""

    def start(stage):
        pod = make_pod(job)
        for earlier in pod.containers:
            if earlier == stage:
                return pod.start(stage)
            terminated = pod.start(earlier).wait()
            assert terminated.exit_code == 0, terminated.log
            assert terminated.lines("epoch") == []
        return None

    return start


def trained_epochs(terminated):
    return [line["epoch"] for line in terminated.lines("epoch")]


def stop(container, stage, run):
    """Stop a container as the kubelet does, and check its exit code, message and files; returns its final state."""
    terminated = container.stop()
    message = terminated.termination_message
    # If the disk of this machine is nearly full, a fast stop is taken for an eviction and counts as a failure.
    evicted = terminated.exit_code == 75 and container.free_disk_share < FREE_SHARE + 0.01
    outcome, exit_code = ("failed", 75) if evicted else ("stopped", 143)
    assert terminated.exit_code == exit_code, terminated.log
    assert message.model_copy(
        update={"error": None, "metric": None, "value": None, "epochs": None}
    ) == TerminationMessage(stage=stage, outcome=outcome, exit_code=exit_code, run=run)
    assert ("disk of the node was nearly full" if evicted else "Start the same job again to resume") in message.error
    assert "Traceback" not in terminated.log
    assert terminated.changed_files == []
    return terminated


def wait_until_done(container, stage, run):
    terminated = container.wait()
    assert terminated.exit_code == 0, terminated.log
    assert (
        terminated.termination_message.stage,
        terminated.termination_message.outcome,
        terminated.termination_message.run,
    ) == (stage, "done", run)
    return terminated


def test_run_stopped_in_every_stage_trains_each_epoch_once(start_in_next_pod, job, solar):
    container = start_in_next_pod("pull")
    container.wait_for_metric(DOWNLOADED_BYTES, at_least=1e6)
    stop(container, "pull", job.run)
    wait_until_done(start_in_next_pod("pull"), "pull", job.run)

    trained = []
    for stage, planned in (("transfer", 150), ("fine-tune", 150)):
        container = start_in_next_pod(stage)
        container.wait_for_log(lambda log: '"epoch": 5,' in log)
        first = stop(container, stage, job.run)
        assert first.termination_message.epochs == len(trained_epochs(first))
        second = wait_until_done(start_in_next_pod(stage), stage, job.run)
        assert trained_epochs(first) + trained_epochs(second) == list(range(1, planned + 1))
        assert second.termination_message.epochs == planned
        trained += [(stage, epoch) for epoch in range(1, planned + 1)]

    history = csv.DictReader(io.StringIO(solar.read(f"runs/{job.run}/history.csv").decode()))
    assert [(row["stage"], int(row["epoch"])) for row in history] == trained
