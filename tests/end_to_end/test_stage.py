"""`topwork stage` in separate processes that share scratch and AWS variables, like the containers of a pod."""

import json
import os
import shutil
import urllib.request
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from topwork.cli.commands.stage import _restart_once
from topwork.clients.s3.objects import FileEntry
from topwork.cluster.termination_message import TerminationMessage
from topwork.registry.stage_keys import stage_keys
from topwork.registry.stage_results import (
    Classifier,
    ParameterCounts,
    attempt_prefix,
    read_run_result,
    write_reference,
    write_stage_result,
)
from topwork.spec.loading.loader import read_jobs
from topwork.stages.pull import pull

FINE_TUNE = {"epochs": 2, "unfreeze": "all", "optimizer": {"name": "adam", "learningRate": 0.0001}}


def run_of(job: Path) -> str:
    return read_jobs(job)[0].run


@pytest.fixture
def without_tensorflow(tmp_path) -> dict[str, str]:
    """Environment variables that make an import of TensorFlow fail."""
    directory = tmp_path / "without"
    directory.mkdir()
    (directory / "tensorflow.py").write_text("raise KeyError('tensorflow was imported')")
    return {"PYTHONPATH": os.pathsep.join([str(directory), *filter(None, [os.environ.get("PYTHONPATH")])])}


def scrape(container) -> dict[tuple[str, ...], float]:
    """Scrape all series: values by series name and label values, sorted by label name."""
    with urllib.request.urlopen(
        f"http://127.0.0.1:{container.field('metrics', 'port')}/metrics", timeout=60
    ) as response:
        families = list(text_string_to_metric_families(response.read().decode()))
    series = {}
    for sample in (sample for family in families for sample in family.samples):
        labels = dict(sorted(sample.labels.items()))
        assert (labels.pop("transferjob"), labels.pop("run")) == ("tiny", container.field("run", "name"))
        series[sample.name, *labels.values()] = sample.value
    return series


def test_containers_that_publish_nothing_report_their_validation_metrics(pod, write_job, storage, without_tensorflow):
    job = write_job(publish={"enabled": False}, evaluate={"metrics": ["f1", "accuracy"]})
    run = run_of(job)
    code, message, trained = pod.run("fine-tune", job)
    assert code == 0
    validated = json.loads(storage.read(f"runs/{run}/validation.json"))
    assert list(message.metrics) == ["f1", "accuracy", "loss"]
    assert message == TerminationMessage(
        stage="fine-tune",
        outcome="done",
        exit_code=0,
        run=run,
        metric="f1",
        value=validated["metrics"]["f1"],
        metrics=validated["metrics"],
        dataset=validated["dataset"],
        weights_from=message.weights_from,
    )
    assert trained.field("done", "images") == validated["images"] == 8
    assert pod.run("fine-tune", job, **without_tensorflow)[:2] == (0, message)
    assert not list(storage.list("models/"))


def stage_seconds(storage, run: str, stage: str) -> float:
    """Return the duration of a stage in seconds from its done.json."""
    done = json.loads(storage.read(f"runs/{run}/{stage}/done.json"))
    if "key" in done and stage != "publish":
        done = json.loads(storage.read(f"stages/{stage}/{done['key']}/done.json"))
    started, finished = (datetime.fromisoformat(done[name]) for name in ("started", "finished"))
    return (finished - started).total_seconds()


def test_containers_publish_a_model_once_and_skip_completed_stages(
    pod, write_job, storage, without_tensorflow, topwork
):
    formats = ["keras", "savedModel"]
    job = write_job(
        fineTune=FINE_TUNE, publish={"formats": formats}, compute={"gpus": 2}, metrics={"lingerSeconds": 300}
    )
    run = run_of(job)

    code, message, pulled = pod.run("pull", job)
    assert (code, message) == (0, TerminationMessage(stage="pull", outcome="done", exit_code=0, run=run))
    assert pulled.field("done", "images") == 40

    code, message, transferred = pod.run("transfer", job)
    best_epoch = transferred.field("done", "best_epoch")
    epochs = [line for line in transferred.lines if line["message"] == "epoch"]
    best = {"metric": "validation_accuracy", "value": epochs[best_epoch - 1]["validation_accuracy"]}
    weights = {"weights_from": f"transfer, epoch {best_epoch}"}
    assert (code, message) == (
        0,
        TerminationMessage(stage="transfer", outcome="done", exit_code=0, run=run, epochs=2, **best, **weights),
    )
    assert transferred.field("stage already complete", "stage") == "pull"
    # TensorFlow without CUDA uses one CPU replica for each requested GPU.
    assert transferred.field("using CPU replicas instead of GPUs", "replicas") == 2

    container = pod.start("fine-tune", job)
    container.wait_for_output('"message": "done"')
    metrics = scrape(container)
    # The container waits for a last scrape: a stop does not change its outcome.
    code, message = container.stop(seconds=10)
    model = storage.uri_of("models/tiny/1")
    main_metric = {"metric": "accuracy", "value": container.field("done", "accuracy")}
    main_metric |= {"weights_from": container.field("done", "weights_from")}
    done = TerminationMessage(
        stage="fine-tune", outcome="done", exit_code=0, run=run, epochs=2, model=model, **main_metric
    )
    assert (code, message) == (0, done)
    assert metrics["topwork_epoch", "transfer"] == 2
    assert metrics["topwork_best_metric", "accuracy", "validation", "transfer"] == best["value"]
    assert metrics["topwork_metric", "accuracy", "test"] == main_metric["value"]
    assert metrics["topwork_replicas",] == 2
    assert metrics["topwork_dataset_images",] == 40
    assert metrics["topwork_exit_code", "fine-tune"] == 0
    for stage in ("pull", "transfer"):
        assert metrics["topwork_stage_duration_seconds", stage] == pytest.approx(
            stage_seconds(storage, run, stage), abs=0.01
        )
    for stage in ("fine-tune", "publish"):
        assert metrics["topwork_stage_duration_seconds", stage] == pytest.approx(
            stage_seconds(storage, run, stage), abs=2
        )

    for stage in ("pull", "transfer"):
        code, message, repeated = pod.run(stage, job, **without_tensorflow)
        assert (code, message.outcome, message.model) == (0, "done", model), repeated.output
    code, message, _ = pod.run("fine-tune", job, **without_tensorflow)
    assert (code, message) == (0, done)
    assert list(pod.working_directory.glob("*")) == list(pod.working_directory.glob("*.log"))
    assert "already published" in topwork("run", job, **pod.variables).stderr


def test_containers_train_all_folds(pod, write_job, storage, two_class_folder, without_tensorflow):
    dataset = {
        "source": {"folder": {"uri": str(two_class_folder)}}, "splits": {"folds": 2}, "imageSize": [32, 32],
    }  # fmt: skip
    job = write_job(dataset=dataset, fineTune=FINE_TUNE)
    assert pod.run("pull", job)[0] == 0
    code, message, transferred = pod.run("transfer", job)
    assert (code, message.outcome) == (0, "done"), transferred.output
    runs = [f"{run_of(job)}-fold-{number}" for number in (1, 2)]
    assert all(storage.size(f"runs/{run}/transfer/done.json") for run in runs)
    code, message, container = pod.run("fine-tune", job)
    assert (code, message.outcome, message.model) == (0, "done", None), container.output
    # The results of the first container are used.
    assert {line["stage"] for line in container.lines if line["message"] == "epoch"} == {"fine-tune"}
    metrics = json.loads(storage.read(f"runs/{run_of(job)}/metrics.json"))["metrics"]
    assert (message.metric, message.value) == ("accuracy", pytest.approx(metrics["accuracy"]))
    code, repeated_message, repeated = pod.run("fine-tune", job, **without_tensorflow)
    assert (code, repeated_message) == (0, message), repeated.output


def test_completed_pull_and_transfer_do_not_import_tensorflow(pod, write_job, without_tensorflow):
    job = write_job()
    for stage in ("pull", "transfer"):
        code, message, first = pod.run(stage, job)
        assert code == 0, first.output
        code, repeated_message, repeated = pod.run(stage, job, **without_tensorflow)
        assert (code, repeated_message) == (0, message), repeated.output


def test_pods_of_a_job_use_its_run_and_its_dataset_although_the_source_grows(
    pod, write_job, make_job, workspace, two_class_folder, without_tensorflow
):
    stored = pull(make_job(), workspace)
    variables = without_tensorflow | {"TOPWORK_RUN": "tiny-0a1b2c3d", "TOPWORK_ATTEMPT": "uid-1"}

    def pull_in_pod(**changes):
        code, message, container = pod.run("pull", write_job(), **(variables | changes))
        assert message.run == "tiny-0a1b2c3d"
        return code, container

    assert pull_in_pod()[0] == 0
    shutil.copytree(two_class_folder / "red", two_class_folder / "green")
    # The same Job keeps its dataset; another one pulls the new images, which needs TensorFlow.
    for changes, is_kept in (
        ({}, True),
        ({"TOPWORK_ATTEMPT": "uid-2"}, False),
        ({"TOPWORK_ATTEMPT": "uid-2", "TOPWORK_DATASET": stored.prefix}, True),
    ):
        code, container = pull_in_pod(**changes)
        assert code == (0 if is_kept else 1), container.output
        if is_kept:
            assert container.field("done", "dataset") == workspace.storage.uri_of(stored.prefix)


@pytest.mark.parametrize("stage", ["transfer", "fine-tune"])
def test_pod_does_not_train_other_weights_than_those_of_the_selected_run(
    pod, write_job, make_job, workspace, without_tensorflow, stage
):
    job, storage = make_job(), workspace.storage
    dataset = pull(job, workspace)
    trained = list(stage_keys(job, dataset.metadata.fingerprint, storage).training_stages.items())[-1]
    variables = without_tensorflow | {"TOPWORK_SELECTED_RUN": "tiny-3-0a1b2c3d"}
    write_reference(storage, "tiny-3-0a1b2c3d", trained[0], "another-key")
    code, message, _ = pod.run(stage, write_job(), **variables)
    assert (code, message.outcome) == (2, "failed")
    assert "changed since the best trial was trained (tiny-3-0a1b2c3d)" in message.error
    # The weights are those of the selected run: it goes on, which needs TensorFlow.
    write_reference(storage, "tiny-3-0a1b2c3d", *trained)
    code, message, _ = pod.run(stage, write_job(), **variables)
    assert "tensorflow was imported" in message.error


def test_restart_deletes_the_results_once_per_job(make_job, workspace):
    job, storage = make_job().as_run("tiny-0a1b2c3d"), workspace.storage
    first_job, second_job = replace(workspace, attempt="uid-1"), replace(workspace, attempt="uid-2")
    dataset = pull(job, first_job)
    key = stage_keys(job, dataset.metadata.fingerprint, storage).transfer
    checkpoints = {
        run: f"{attempt_prefix('transfer', key, run)}/checkpoints/1/x" for run in (job.run, "other-1a2b3c4d")
    }
    storage.write("models/tiny/1/manifest.json", b"{}")

    def train() -> None:
        now = datetime.now(UTC)
        write_stage_result(
            storage,
            key,
            Classifier(
                stage="transfer",
                key=f"stages/transfer/{key}/model-0000000000000000.keras",
                file=FileEntry(size=1, sha256="0" * 64),
                class_names=("blue", "red"),
                image_size=(32, 32),
                history=[],
                best_epoch=1,
                parameters=ParameterCounts(trainable=1, frozen=0),
                started=now,
                finished=now,
                seconds=1.0,
            ),
        )
        write_reference(storage, job.run, "transfer", key)
        for checkpoint in checkpoints.values():
            storage.write(checkpoint, b"x")

    for pod_workspace in (first_job, second_job):
        train()
        _restart_once(job, pod_workspace)
        assert read_run_result(storage, job.run, "transfer") is None
        # Checkpoints of another run that is training this stage stay, as do versions and datasets.
        assert [bool(storage.size(name)) for name in checkpoints.values()] == [False, True]
        assert storage.size("models/tiny/1/manifest.json")
        assert storage.size(f"{dataset.prefix}/manifest.json")
        train()
        # The next container, and a pod that replaces this one.
        for _ in range(2):
            _restart_once(job, pod_workspace)
            assert read_run_result(storage, job.run, "transfer")


def test_single_fine_tune_container_publishes_a_job_without_fine_tuning(pod, write_job, storage):
    pod.python = None  # like in a container, the process imports TensorFlow itself
    code, message, container = pod.run("fine-tune", write_job())
    assert code == 0, container.output
    assert "done" in container.messages  # every line is JSON, in spite of TensorFlow's own messages
    assert (message.outcome, message.epochs, message.model) == ("done", None, storage.uri_of("models/tiny/1"))


def test_failed_gate_exits_with_3_and_is_visible_to_the_last_scrape(pod, write_job):
    gate = {"metric": "calibrationError", "atMost": 0.0}
    metrics = {"pushgateway": "http://127.0.0.1:9", "lingerSeconds": 300}
    job = write_job(evaluate={"metrics": ["calibrationError"], "gates": [gate]}, metrics=metrics)
    container = pod.start("fine-tune", job)
    container.wait_for_output('"message": "outcome not pushed"')
    metrics = scrape(container)
    assert (metrics["topwork_exit_code", "fine-tune"], metrics["topwork_gates_failed",]) == (3, 1)
    assert sum(name[0] == "topwork_stage_running" and value for name, value in metrics.items()) == 0
    code, message = container.stop(seconds=10)
    assert (code, message.outcome, message.exit_code, message.model) == (3, "failed", 3, None), container.output
    assert "calibrationError" in message.error
    assert [line["level"] for line in container.lines if line["level"] not in ("info", "warning")] == ["error"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "{file}: does not exist. Check the path."),
        ("", "{file}: contains no job. A spec starts with apiVersion: topwork.dev/v1alpha1."),
        ("kind: TransferJob", "{file}:1:1: apiVersion: "),
        (
            "{job}\n---\n{job}",
            "{file} contains 2 jobs (tiny, tiny), but a pod runs exactly one. Put each job in its own file.",
        ),
    ],
    ids=["missing", "empty", "wrong", "two"],
)
def test_job_file_without_exactly_one_job_is_rejected(pod, write_job, content, expected):
    file = write_job()
    job = file.read_text()
    file.unlink()
    if content is not None:
        file.write_text(content.replace("{job}", job))
    code, message, container = pod.run("pull", file)
    assert (code, message.exit_code) == (2, 2)
    assert message.error.startswith(expected.format(file=file))
    assert container.lines[-1]["message"] == message.error


def test_bug_exits_with_1_and_logs_its_traceback(pod, write_job, without_tensorflow):
    code, message, container = pod.run("transfer", write_job(), **without_tensorflow)
    assert (code, message.outcome, message.error) == (1, "failed", "KeyError: 'tensorflow was imported'")
    assert container.lines[-1]["level"] == "error"
    assert container.lines[-1]["traceback"].startswith("Traceback (most recent call last):")
    assert container.lines[-1]["traceback"].endswith("KeyError: 'tensorflow was imported'")


def test_scratch_directory_that_cannot_be_created_is_reported(pod, write_job):
    pod.scratch = Path("/proc/scratch")
    code, message, _ = pod.run("pull", write_job())
    assert code == 2
    assert message.error.startswith("Cannot create the scratch directory /proc/scratch/tiny-")
