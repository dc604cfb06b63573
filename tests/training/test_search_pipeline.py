"""Searches on this machine: trials one after the other, failures, outages, a changed source, and publishing."""

import errno
import shutil
import urllib.request
from types import SimpleNamespace

import keras
import pytest

from topwork import pipeline, search_pipeline
from topwork.cli.runtime.shutdown import to_topwork_error
from topwork.disk_space import report_full_disk
from topwork.errors import DataError, GateError, SettingError, UnavailableError
from topwork.registry import versions
from topwork.registry.searches import list_searches, read_search
from topwork.registry.split_inputs import identify_split_images, read_split_inputs
from topwork.search.search_id import search_id
from topwork.search.storage_journal import StorageJournal
from topwork.search.study import Study
from topwork.spec.search import TransferSearch

RATE = "transfer.optimizer.learningRate"
SPACE = {RATE: {"choice": [0.001, 0.01, 0.02]}}


@pytest.fixture
def make_search(make_job):
    """Build a search over the tiny job; keyword arguments replace keys of `spec.template` or of `spec`."""

    def make(template=None, **spec):
        content = make_job(**(template or {})).spec.model_dump(mode="json", by_alias=True, exclude_unset=True)
        content = {"template": content, "space": SPACE, "sampler": "grid", "trials": 3, **spec}
        return TransferSearch.model_validate(
            {
                "apiVersion": "topwork.dev/v1alpha1",
                "kind": "TransferSearch",
                "metadata": {"name": "tiny"},
                "spec": content,
            }
        )

    return make


@pytest.fixture
def run(workspace, export_check_in_process):
    """Run a search in this process; returns its outcome."""

    def run_search(search):
        coordination = search_pipeline.Coordination("holder", lambda _: None, to_topwork_error)
        return search_pipeline.run(search, workspace, coordination)

    return run_search


@pytest.fixture
def train(monkeypatch):
    """Replace training and publishing, which other tests cover; `train.result` computes the accuracy of a job."""

    def run_job(job, workspace):
        record.jobs.append(job)
        accuracy = record.result(job)
        if job.spec.publishes:
            return SimpleNamespace(uri=f"{workspace.storage.uri}/models/tiny/1", summary=list)
        dataset = identify_split_images(workspace.dataset, read_split_inputs(job, workspace.storage))
        return SimpleNamespace(metrics={"accuracy": accuracy, "loss": 1 - accuracy}, undefined={}, dataset=dataset)

    record = SimpleNamespace(jobs=[], result=lambda job: job.spec.transfer.optimizer.learning_rate)
    monkeypatch.setattr(pipeline, "run", run_job)
    return record


def open_study(search, storage):
    return Study(search, StorageJournal(storage, search_id(search)))


def test_a_failed_trial_is_recorded_and_the_best_one_published(make_search, run, storage):
    missing = {"saved": {"uri": f"{storage.uri}/missing.keras"}}
    search = make_search(space={"model.base": {"choice": [missing, {"cnn": {"filters": [4]}}]}}, trials=2)
    outcome = run(search)
    study = open_study(search, storage)
    failed = [trial for trial in study.trials if trial.state == "failed"]
    assert [trial.params["model.base"] for trial in failed] == [missing]
    assert "storage has no such object" in failed[0].error
    assert outcome.best == study.best

    # The published model is that of the trial, measured on the test split.
    version = versions.read_version(storage, "tiny", 1)
    assert study.published == outcome.published.uri == version.uri
    assert version.split == "test"
    assert read_search(storage, search_id(search)) == search
    assert list_searches(storage, "tiny") == [search_id(search)]
    report = storage.read(f"searches/{search_id(search)}/report.html").decode()
    assert outcome.report_uri.endswith("/report.html")
    assert f"{version.metrics['accuracy']:.4f}" in report
    assert "storage has no such object" in report

    # The same command again neither trains nor publishes.
    assert run(search).published.uri == version.uri
    assert list(versions.list_versions(storage, "tiny")) == [1]


def test_more_trials_continue_the_search(make_search, run, storage, train):
    run(make_search(trials=1))
    train.jobs.clear()
    outcome = run(make_search(trials=2))
    assert [job.metadata.name for job in train.jobs] == ["tiny-1", "tiny"]
    assert outcome.trials == 2
    assert [trial.state for trial in open_study(make_search(), storage).trials] == ["complete", "complete"]


def test_gate_that_is_not_met_publishes_nothing_and_names_the_report(make_search, run, storage):
    evaluate = {"metrics": ["accuracy"], "gates": [{"metric": "accuracy", "atMost": 0.0}]}
    search = make_search({"evaluate": evaluate}, trials=1)
    with pytest.raises(GateError, match=r"accuracy.*Report of the search: s3://.*/searches/tiny-.*/report\.html"):
        run(search)
    assert not versions.list_versions(storage, "tiny")
    assert "there is no value on the test split" in storage.read(f"searches/{search_id(search)}/report.html").decode()
    # A gate is no part of the search: the trained model is evaluated again.
    gates = [{"metric": "accuracy", "atLeast": 0.0}]
    assert run(make_search({"evaluate": evaluate | {"gates": gates}}, trials=1)).published.version == 1


def test_outage_ends_the_search_without_a_failed_trial(make_search, run, storage, train):
    def fail(job):
        raise UnavailableError("storage is down")

    result, train.result = train.result, fail
    with pytest.raises(UnavailableError, match="storage is down"):
        run(make_search(trials=2))
    assert [trial.state for trial in open_study(make_search(), storage).trials] == ["running"]
    train.result = result
    run(make_search(trials=2))
    assert [trial.state for trial in open_study(make_search(), storage).trials] == ["complete", "complete"]


def test_exhausted_disk_quota_ends_the_search_without_a_failed_trial(make_search, run, storage, train, tmp_path):
    def fail(job):
        with report_full_disk(tmp_path):  # as `pipeline.run` does
            raise OSError(errno.EDQUOT, "Disk quota exceeded")

    train.result = fail
    with pytest.raises(SettingError, match="The disk quota is exhausted"):
        run(make_search())
    assert [trial.state for trial in open_study(make_search(), storage).trials] == ["running"]


def test_search_ends_with_the_error_that_all_trials_share(make_search, run, storage, train):
    def fail(job):
        raise RuntimeError(f"bug in {job.metadata.name}")

    train.result = fail
    search = make_search(space={RATE: {"choice": [0.001, 0.002, 0.003, 0.004, 0.005]}}, trials=5)
    with pytest.raises(DataError, match="RuntimeError: bug in tiny-2"):
        run(search)
    assert [trial.state for trial in open_study(search, storage).trials] == ["failed"] * 3
    assert b"bug in tiny-1" in storage.read(f"searches/{search_id(search)}/report.html")


def test_exhausted_memory_fails_a_trial(make_search, run, storage, train):
    result = train.result

    def exhaust(job):
        if job.metadata.name == "tiny-0":
            raise MemoryError
        return result(job)

    train.result = exhaust
    run(make_search(trials=2))
    first, second = open_study(make_search(), storage).trials
    assert (first.state, second.state) == ("failed", "complete")
    assert "lower batchSize" in first.error


def test_all_trials_use_the_images_of_the_first_one(make_search, run, storage, train, two_class_folder):
    run(make_search(trials=1))
    shutil.copy(two_class_folder / "red" / "01.png", two_class_folder / "red" / "copy.png")
    run(make_search(trials=3))
    results = [trial.results[-1] for trial in open_study(make_search(), storage).trials]
    assert len(results) == 3
    assert len({result.dataset for result in results}) == 1


def test_trial_on_other_validation_images_fails(make_search, run, storage, train, two_class_folder):
    names = sorted(str(path.relative_to(two_class_folder)) for path in two_class_folder.rglob("*.*"))
    parts = {"train": names[::2], "validation": names[1::4], "test": names[3::4]}
    for name, images in parts.items():
        storage.write(f"lists/{name}.txt", "\n".join(images).encode())
    lists = {name: {"list": f"{storage.uri}/lists/{name}.txt"} for name in parts}
    template = {
        "dataset": {"source": {"folder": {"uri": str(two_class_folder)}}, "imageSize": [32, 32], "splits": lists}
    }
    run(make_search(template, trials=1))
    storage.write("lists/validation.txt", "\n".join(parts["validation"][1:]).encode())
    run(make_search(template, trials=2))
    first, second = open_study(make_search(template), storage).trials
    assert (first.state, second.state) == ("complete", "failed")
    assert "a list of the splits has changed, so the values cannot be compared" in second.error


def test_another_model_than_the_selected_one_is_not_published(make_search, run, storage, tmp_path):
    def save_base(filters):
        image = keras.Input((32, 32, 3))
        maps = keras.layers.Conv2D(filters, 3, strides=4)(image)
        keras.Model(image, keras.layers.Dense(2)(keras.layers.Flatten()(maps))).save(tmp_path / "base.keras")

    save_base(3)
    base = {"model": {"base": {"saved": {"uri": str(tmp_path / "base.keras")}}}}
    run(make_search(base, trials=1))
    save_base(4)
    with pytest.raises(DataError, match=r"The base or a list of the splits has changed since the best trial was"):
        run(make_search(base, trials=1))
    assert list(versions.list_versions(storage, "tiny")) == [1]


def test_search_without_its_dataset_does_not_continue(make_search, run, storage, train):
    run(make_search(trials=1))
    storage.delete([stored.key for stored in storage.list("datasets/")])
    with pytest.raises(DataError, match="the dataset of the search, was deleted"):
        run(make_search(trials=2))


def test_series_show_the_search(make_search, run, workspace, train):
    run(make_search())
    with urllib.request.urlopen(f"http://127.0.0.1:{workspace.metrics.serve(0, '127.0.0.1')}/metrics") as response:
        lines = response.read().decode().splitlines()
    assert 'topwork_search_trials{state="complete",transfersearch="tiny"} 3.0' in lines
    assert 'topwork_search_best{name="accuracy",transfersearch="tiny"} 0.02' in lines
