"""`topwork stage`, as the containers of a pod call it: processes of their own, storage by its AWS variables alone."""

import json
import os
import urllib.request
from datetime import datetime
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from topwork.cluster.termination_message import TerminationMessage
from topwork.spec.loading.loader import read_jobs

FINE_TUNE = {"epochs": 2, "unfreeze": "all", "optimizer": {"name": "adam", "learningRate": 0.0001}}


def run_of(job: Path) -> str:
    return read_jobs(job)[0].run


@pytest.fixture
def without_tensorflow(tmp_path) -> dict[str, str]:
    """Variables under which the import of TensorFlow fails."""
    folder = tmp_path / "without"
    folder.mkdir()
    (folder / "tensorflow.py").write_text("raise KeyError('tensorflow was imported')")
    return {"PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])}


def scraped(process) -> dict[tuple[str, ...], float]:
    """Value of each series, by its name and the values of its own labels, in the order of their names."""
    with urllib.request.urlopen(f"http://127.0.0.1:{process.fact('metrics', 'port')}/metrics", timeout=60) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    found = {}
    for sample in (sample for family in families for sample in family.samples):
        labels = dict(sorted(sample.labels.items()))
        assert (labels.pop("transferjob"), labels.pop("run")) == ("tiny", process.fact("run", "name"))
        found[sample.name, *labels.values()] = sample.value
    return found


def lasted(storage, run: str, stage: str) -> float:
    """Seconds that a stage took, as its mark in storage says."""
    mark = json.loads(storage.read(f"runs/{run}/{stage}/done.json"))
    times = (datetime.fromisoformat(mark[name]) for name in ("started", "finished"))
    return -sum(time.timestamp() * sign for time, sign in zip(times, (1, -1), strict=True))


def test_three_containers_publish_a_model_and_find_it_the_next_time(pod, write, storage, without_tensorflow, topwork):
    job = write(fineTune=FINE_TUNE, compute={"gpus": 2}, metrics={"lingerSeconds": 300})
    run = run_of(job)

    code, ending, pulled = pod.run("pull", job)
    assert (code, ending) == (0, TerminationMessage(stage="pull", outcome="done", exit_code=0, run=run))
    assert pulled.fact("done", "images") == 40

    code, ending, transferred = pod.run("transfer", job)
    best = {"metric": "validation_accuracy", "value": transferred.lines[-2]["validation_accuracy"]}
    assert (code, ending) == (0, TerminationMessage(stage="transfer", outcome="done", exit_code=0, run=run, epochs=2, **best))
    assert transferred.fact("stage already complete", "stage") == "pull"
    # This TensorFlow knows no GPU: two were asked for, and the job is tried on as many replicas without.
    note = "using CPU replicas instead of GPUs"
    assert transferred.fact(note, "replicas") == 2

    process = pod.start("fine-tune", job)
    process.wait_for_line('"message": "done"')
    metrics = scraped(process)
    # Who waits for a last scrape is done, and ends so.
    code, ending = process.stop(seconds=10)
    model = storage.uri_of("models/tiny/1")
    main = {"metric": "accuracy", "value": process.fact("done", "accuracy")}
    done = TerminationMessage(stage="fine-tune", outcome="done", exit_code=0, run=run, epochs=2, model=model, **main)
    assert (code, ending) == (0, done)
    assert metrics["topwork_epoch", "transfer"] == 2
    assert metrics["topwork_best_metric", "accuracy", "validation", "transfer"] == best["value"]
    assert metrics["topwork_metric", "accuracy", "test"] == main["value"]
    assert metrics["topwork_replicas",] == 2
    assert metrics["topwork_dataset_images",] == 40
    assert metrics["topwork_exit_code", "fine-tune"] == 0
    for stage in ("pull", "transfer"):
        assert metrics["topwork_stage_duration_seconds", stage] == pytest.approx(lasted(storage, run, stage), abs=0.01)
    for stage in ("fine-tune", "publish"):
        assert metrics["topwork_stage_duration_seconds", stage] == pytest.approx(lasted(storage, run, stage), abs=2)

    for stage in ("pull", "transfer"):
        code, ending, found = pod.run(stage, job, **without_tensorflow)
        assert (code, ending.outcome, ending.model) == (0, "done", model), found.output
    code, ending, _ = pod.run("fine-tune", job, **without_tensorflow)
    assert (code, ending) == (0, done)
    assert list(pod.folder.glob("*")) == list(pod.folder.glob("*.log"))
    assert "already published" in topwork("run", job, **pod.variables).stderr


def test_pull_and_transfer_that_are_done_need_no_tensorflow(pod, write, without_tensorflow):
    job = write()
    for stage in ("pull", "transfer"):
        code, ending, first = pod.run(stage, job)
        assert code == 0, first.output
        code, again, found = pod.run(stage, job, **without_tensorflow)
        assert (code, again) == (0, ending), found.output


def test_a_job_without_fine_tuning_is_published_by_its_last_container_alone(pod, write, storage):
    code, ending, process = pod.run("fine-tune", write())
    assert code == 0, process.output
    assert (ending.outcome, ending.epochs, ending.model) == ("done", None, storage.uri_of("models/tiny/1"))


def test_a_gate_that_is_not_met_ends_with_3_and_is_seen_by_a_last_scrape(pod, write):
    gate = {"metric": "calibrationError", "atMost": 0.0}
    away = {"pushgateway": "http://127.0.0.1:9", "lingerSeconds": 300}
    job = write(evaluate={"metrics": ["calibrationError"], "gates": [gate]}, metrics=away)
    process = pod.start("fine-tune", job)
    process.wait_for_line('"message": "outcome not pushed"')
    metrics = scraped(process)
    assert (metrics["topwork_exit_code", "fine-tune"], metrics["topwork_gates_failed",]) == (3, 1)
    assert sum(name[0] == "topwork_stage_running" and value for name, value in metrics.items()) == 0
    code, ending = process.stop(seconds=10)
    assert (code, ending.outcome, ending.exit_code, ending.model) == (3, "failed", 3, None), process.output
    assert "calibrationError" in ending.error
    assert [line["level"] for line in process.lines if line["level"] not in ("info", "warning")] == ["error"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "{file}: does not exist. Check the path."),
        ("", "{file}: contains no job. A spec starts with apiVersion: topwork.dev/v1alpha1."),
        ("kind: TransferJob", "{file}:1:1: apiVersion: "),
        ("{one}\n---\n{one}", "{file} contains 2 jobs (tiny, tiny), but a pod runs exactly one. Put each job in its own file."),
    ],
    ids=["missing", "empty", "wrong", "two"],
)
def test_a_job_file_that_holds_no_or_several_jobs_is_refused(pod, write, content, said):
    file = write()
    one = file.read_text()
    file.unlink()
    if content is not None:
        file.write_text(content.replace("{one}", one))
    code, ending, process = pod.run("pull", file)
    assert (code, ending.exit_code) == (2, 2)
    assert ending.error.startswith(said.format(file=file))
    assert process.lines[-1]["message"] == ending.error


def test_a_bug_ends_with_1_and_its_traceback(pod, write, without_tensorflow):
    code, ending, process = pod.run("transfer", write(), **without_tensorflow)
    assert (code, ending.outcome, ending.error) == (1, "failed", "KeyError: 'tensorflow was imported'")
    assert process.lines[-1]["level"] == "error"
    assert process.lines[-1]["traceback"].startswith("Traceback (most recent call last):")
    assert process.lines[-1]["traceback"].endswith("KeyError: 'tensorflow was imported'")


def test_scratch_that_can_not_be_written_is_named(pod, write):
    pod.scratch = Path("/proc/scratch")
    code, ending, _ = pod.run("pull", write())
    assert code == 2
    assert ending.error.startswith("Cannot create the scratch directory /proc/scratch/tiny-")
