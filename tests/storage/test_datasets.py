"""The dataset that a job uses: a source that changes gives a new dataset and says what changed."""

import json
import shutil

import pytest
from PIL import Image

from topwork.data.sources.source import SourceEntry
from topwork.errors import DataError
from topwork.registry.dataset_changes import describe_changes
from topwork.registry.datasets import FORMAT, read_entries, select_dataset, write_entries
from topwork.stages import pull as pull_module
from topwork.stages.pull import find_pulled_dataset, pull, wait_for_dataset


def entry(path, version="1"):
    return SourceEntry(path, path.split("/")[0], 10, version)


BEFORE = [entry("cat/1.jpg"), entry("cat/2.jpg"), entry("dog/1.jpg")]


@pytest.mark.parametrize(
    ("after", "changes"),
    [
        (BEFORE, ""),
        ([*BEFORE, entry("cat/3.jpg")], "1 image added"),
        ([*BEFORE, entry("cat/3.jpg"), entry("cat/4.jpg")], "2 images added"),
        (BEFORE[1:], "1 image removed"),
        (
            [*BEFORE[1:], entry("cat/3.jpg"), entry("cat/4.jpg"), entry("fox/1.jpg")],
            "3 images added, 1 removed, 1 new class",
        ),
        (BEFORE[:2], "1 image removed, 1 removed class"),
        ([entry("cat/1.jpg", "2"), *BEFORE[1:]], "1 image changed"),
        ([SourceEntry("cat/1.jpg", "dog", 10, "1"), *BEFORE[1:]], "1 image relabeled"),
        ([*BEFORE, entry("fox/1.jpg"), entry("owl/1.jpg")], "2 images added, 2 new classes"),
        (
            [SourceEntry("cat/1.jpg", "cat", 10, "1", "test", "p1"), *BEFORE[1:]],
            "1 image moved to another split or group",
        ),
        (None, "content changed"),
    ],
)
def test_changes_of_a_source_are_counted(after, changes):
    assert describe_changes(BEFORE, after) == changes


def test_changes_since_an_unlisted_source_are_not_counted():
    assert describe_changes(None, BEFORE) == "content changed"


def test_stored_listing_is_read_back_and_always_has_the_same_bytes(make_job, workspace, tmp_path):
    entries = [
        SourceEntry('cat/a, "b"\n\r.jpg', "cat", 0, None),
        SourceEntry("é/猫.png", None, None, "W/etag"),
    ]
    first, second = tmp_path / "first", tmp_path / "second"
    for directory in (first, second):
        directory.mkdir()
        write_entries(entries, directory)
    data = (first / "entries.csv.gz").read_bytes()
    assert data == (second / "entries.csv.gz").read_bytes()
    dataset = pull(make_job(), workspace)
    workspace.storage.write(f"{dataset.prefix}/entries.csv.gz", data)
    assert read_entries(dataset, workspace.storage) == entries


def add_images(folder, class_name, count):
    (folder / class_name).mkdir(exist_ok=True)
    for number in range(count):
        Image.new("RGB", (20, 20), (number, 200, number)).save(folder / class_name / f"new-{number}.png")


def publish_version(workspace, number, dataset):
    """Write `latest.json` as publishing does."""
    latest = {
        "name": "tiny", "version": number, "uri": "s3://…", "run": "tiny-1", "weights": "0a",
        "published": "2030-01-01T00:00:00Z", "main_metric": "accuracy", "metrics": {}, "split": "test", "images": 1,
        "dataset": dataset,
    }  # fmt: skip
    workspace.storage.write("models/tiny/latest.json", json.dumps(latest).encode())


def test_grown_folder_is_a_new_dataset_and_the_change_is_described(make_job, workspace, two_class_folder):
    job = make_job()
    assert select_dataset(job, workspace).stored is None
    first = pull(job, workspace)
    selected = select_dataset(job, workspace)
    assert (selected.stored.prefix, selected.changes) == (first.prefix, "")
    publish_version(workspace, 4, first.prefix)
    add_images(two_class_folder, "green", 3)
    (two_class_folder / "red" / "00.jpg").unlink()
    selected = select_dataset(job, workspace)
    assert selected.stored is None
    assert selected.changes == "3 images added, 1 removed, 1 new class since version 4"
    second = pull(job, workspace)
    assert (second.prefix != first.prefix, second.metadata.images) == (True, 42)
    # Until a version uses it, the change is still one since version 4.
    assert select_dataset(job, workspace).changes.endswith("since version 4")
    publish_version(workspace, 5, second.prefix)
    assert select_dataset(job, workspace).changes == ""


def test_change_without_a_version_is_described_since_the_last_pull(make_job, workspace, two_class_folder):
    pull(make_job(), workspace)
    add_images(two_class_folder, "red", 2)
    assert select_dataset(make_job(), workspace).changes == "2 images added since the last pull"


def test_pinned_job_keeps_the_dataset_of_the_latest_version(make_job, workspace, two_class_folder):
    job = make_job()
    with pytest.raises(DataError, match=r"storage has no dataset of .*Run the job without --pinned"):
        select_dataset(job, workspace, pinned=True)
    first = pull(job, workspace)
    publish_version(workspace, 1, first.prefix)
    add_images(two_class_folder, "green", 20)
    pull(job, workspace)
    selected = select_dataset(job, workspace, pinned=True)
    assert (selected.stored.prefix, selected.fingerprint) == (first.prefix, first.metadata.fingerprint)


def test_folder_on_s3_is_compared_by_its_listing(make_job, workspace, two_class_folder):
    photos = workspace.storage.at(f"{workspace.storage.uri}-photos")
    for path in sorted(two_class_folder.rglob("*.*")):
        photos.upload(path, path.relative_to(two_class_folder).as_posix())
    dataset = {
        "source": {"folder": {"uri": photos.uri}},
        "splits": {"train": "train[:60%]", "test": "train[80%:]"},
        "imageSize": [32, 32],
    }
    job = make_job(dataset=dataset)
    pull(job, workspace)
    photos.write("red/00.jpg", (two_class_folder / "red" / "02.jpg").read_bytes())
    photos.write("red/x.jpg", (two_class_folder / "red" / "04.jpg").read_bytes())
    assert select_dataset(job, workspace).changes == "1 image added, 1 changed since the last pull"


def test_archive_that_changed_is_reported(make_job, workspace, two_class_folder, tmp_path):
    def pack(name):
        return shutil.make_archive(str(tmp_path / "pets"), name, two_class_folder)

    for name, expected in (("zip", "2 images added"), ("gztar", "content changed")):
        dataset = {
            "source": {"archive": {"uri": pack(name)}},
            "splits": {"train": "train[:60%]", "test": "train[80%:]"},
            "imageSize": [32, 32],
        }
        job = make_job(dataset=dataset)
        pull(job, workspace)
        add_images(two_class_folder, "red", 2)
        pack(name)
        assert select_dataset(job, workspace).changes == f"{expected} since the last pull"
        for path in (two_class_folder / "red").glob("new-*"):
            path.unlink()


def test_table_reports_new_and_relabeled_rows(make_job, workspace, two_class_folder, tmp_path):
    rows = [(path, path.parent.name) for path in sorted(two_class_folder.rglob("*.*"))]

    def write(rows):
        lines = ["image,label", *(f"{path},{label}" for path, label in rows)]
        (tmp_path / "table.csv").write_text("\n".join(lines))

    write(rows[1:])
    dataset = {
        "source": {"table": {"uri": str(tmp_path / "table.csv")}},
        "splits": {"train": "train[:60%]", "test": "train[80%:]"},
        "imageSize": [32, 32],
    }
    job = make_job(dataset=dataset)
    pull(job, workspace)
    write([(rows[1][0], "red"), rows[0], *rows[2:]])
    assert select_dataset(job, workspace).changes == "1 image added, 1 relabeled since the last pull"


def test_pods_of_one_job_keep_their_dataset(make_job, workspace, two_class_folder):
    from dataclasses import replace

    job = make_job()
    first_attempt, second_attempt = replace(workspace, attempt="uid-1"), replace(workspace, attempt="uid-2")
    first = pull(job, first_attempt)
    add_images(two_class_folder, "green", 20)
    assert find_pulled_dataset(job, first_attempt).prefix == first.prefix
    assert find_pulled_dataset(job, second_attempt) is None
    second = pull(job, second_attempt)
    assert second.prefix != first.prefix
    assert find_pulled_dataset(job, second_attempt).prefix == second.prefix


def test_waiting_node_finds_a_dataset_that_another_job_of_the_run_has_recorded(make_job, workspace, monkeypatch):
    from dataclasses import replace

    job = make_job()
    node_0, prefetch = replace(workspace, attempt="uid-1"), replace(workspace, attempt="uid-prefetch")
    first = pull(job, node_0)
    find_pulled_dataset(job, prefetch)  # finished after node 0
    monkeypatch.setattr(pull_module, "WAIT_POLL_SECONDS", 0.05)
    monkeypatch.setattr(pull_module, "WAIT_REPORT_SECONDS", 0.2)
    assert wait_for_dataset(job, node_0).prefix == first.prefix


def test_waiting_node_does_not_take_the_dataset_of_an_earlier_source(
    make_job, workspace, two_class_folder, monkeypatch
):
    from dataclasses import replace
    from threading import Timer

    job = make_job()
    pull(job, replace(workspace, attempt="uid-0"))
    add_images(two_class_folder, "green", 20)
    monkeypatch.setattr(pull_module, "WAIT_POLL_SECONDS", 0.05)
    monkeypatch.setattr(pull_module, "WAIT_REPORT_SECONDS", 0.1)
    pulled = []
    node_0 = Timer(1.0, lambda: pulled.append(pull(job, replace(workspace, attempt="uid-1"))))
    node_0.start()
    found = wait_for_dataset(job, replace(workspace, attempt="uid-1"))
    node_0.join()
    assert found.prefix == pulled[0].prefix


def test_selected_dataset_that_was_deleted_is_reported(make_job, workspace):
    from dataclasses import replace

    pinned = replace(workspace, dataset="datasets/photos/0000000000000000")
    with pytest.raises(DataError, match="does not exist any more"):
        pull(make_job(), pinned)


def test_dataset_of_another_format_is_not_pinned(make_job, workspace):
    dataset = pull(make_job(), workspace)
    manifest = json.loads(workspace.storage.read(f"{dataset.prefix}/manifest.json"))
    assert manifest["facts"]["pull_format"] == FORMAT
    manifest["facts"]["pull_format"] = 1
    workspace.storage.write(f"{dataset.prefix}/manifest.json", json.dumps(manifest).encode())
    with pytest.raises(DataError, match="another version of topwork pulled with other rules"):
        select_dataset(make_job(), workspace, pinned=True)
