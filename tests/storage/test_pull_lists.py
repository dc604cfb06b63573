"""Splits from lists of images, from the list to the images of each split."""

import csv
import shutil
import tarfile
import zipfile

import pytest
from structlog.testing import capture_logs

from topwork.data.local_dataset import fetch_dataset
from topwork.errors import DataError
from topwork.registry.stage_keys import stage_keys
from topwork.stages.pull import find_pulled_dataset, pull

PARTS = {"train": range(10), "validation": range(10, 13), "test": range(13, 18)}


@pytest.fixture
def write_lists(storage):
    """Write the lists of all splits to storage, and return `spec.dataset.splits`."""

    def write(line="{label}/{number:02}", **extra):
        splits = {}
        for split, numbers in PARTS.items():
            lines = [line.format(label=label, number=number) for label in ("blue", "red") for number in numbers]
            storage.write(f"lists/{split}.txt", "\n".join([*lines, *extra.get(split, ())]).encode())
            splits[split] = {"list": storage.uri_of(f"lists/{split}.txt")}
        return splits

    return write


@pytest.fixture
def make_list_job(make_job):
    def make(splits, source=None, **settings):
        source = source or make_job().spec.dataset.source.model_dump(mode="json", exclude_none=True)
        return make_job(dataset={"source": source, "splits": splits, "imageSize": [32, 32], **settings})

    return make


def numbers(split):
    return sorted((name.split("/")[-2], int(name.split("/")[-1].partition(".")[0])) for name in split.names)


def check_splits(local):
    for name, split in {"train": local.train, "validation": local.validation, "test": local.test}.items():
        assert numbers(split) == [(label, number) for label in ("blue", "red") for number in PARTS[name]]
    assert local.notes == ("Not used: 4 of 40 images, which are in no list.",)


@pytest.fixture
def open_source(storage, two_class_folder, tmp_path):
    """Make the folder available as another kind of source."""

    def make(kind):
        if kind == "zip":
            with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
                for path in sorted(two_class_folder.rglob("*.*")):
                    archive.write(path, f"pets/images/{path.relative_to(two_class_folder)}")
            return {"archive": {"uri": str(tmp_path / "photos.zip"), "root": "pets/images"}}
        if kind == "tar":
            with tarfile.open(tmp_path / "photos.tar.gz", "w:gz") as archive:
                archive.add(two_class_folder, "photos")
            return {"archive": {"uri": str(tmp_path / "photos.tar.gz"), "root": "photos"}}
        photos = storage.at(f"{storage.uri}-photos")
        for path in two_class_folder.rglob("*.*"):
            photos.upload(path, str(path.relative_to(two_class_folder)))
        if kind == "prefix":
            return {"folder": {"uri": photos.uri}}
        with (tmp_path / "labels.csv").open("w", newline="") as file:
            rows = [(path.relative_to(two_class_folder), path.parent.name) for path in two_class_folder.rglob("*.*")]
            csv.writer(file).writerows([("image", "label"), *rows])
        photos.upload(tmp_path / "labels.csv", "labels.csv")
        return {"table": {"uri": photos.uri_of("labels.csv")}}

    return make


@pytest.mark.parametrize("kind", ["prefix", "zip", "tar", "table"])
def test_listed_images_are_in_their_split(kind, open_source, write_lists, make_list_job, workspace):
    job = make_list_job(write_lists(), open_source(kind))
    with capture_logs() as logs:
        local = fetch_dataset(pull(job, workspace), job, workspace)
    check_splits(local)
    assert [entry["note"] for entry in logs if "note" in entry] == list(local.notes)


def test_image_that_was_rejected_is_reported_and_does_not_fail_the_job(
    write_lists, make_list_job, workspace, two_class_folder
):
    (two_class_folder / "red" / "broken.jpg").write_bytes(b"no image")
    shutil.copy(two_class_folder / "red" / "18.jpg", two_class_folder / "blue" / "copy.jpg")
    job = make_list_job(write_lists(train=["red/broken"], test=["blue/copy.jpg"]))
    local = fetch_dataset(pull(job, workspace), job, workspace)
    assert (local.train.size, local.test.size) == (20, 10)
    (note,) = [note for note in local.notes if "rejected" in note]
    assert note.startswith("Not used: 2 listed images that the pull rejected: red/broken.jpg (train; ")
    assert "blue/copy.jpg (test; same pixels as an image of another class)" in note
    failing = make_list_job(write_lists(train=["red/broken"]), onCorruptImage="fail")
    with pytest.raises(DataError, match=r"onCorruptImage is fail"):
        pull(failing, workspace)


def test_lines_of_a_class_that_is_left_out_are_ignored(write_lists, make_list_job, workspace, two_class_folder):
    shutil.copytree(two_class_folder / "red", two_class_folder / "purple")
    job = make_list_job(write_lists(train=["purple/01", "./purple/02.jpg"]), classes={"exclude": ["purple"]})
    local = fetch_dataset(pull(job, workspace), job, workspace)
    assert (
        "Ignored in the train list: 2 lines with images of classes that spec.dataset.classes leaves out." in local.notes
    )
    assert not [name for name in local.train.names if name.startswith("purple")]
    # Other lines without an image are still an error.
    job = make_list_job(write_lists(train=["blue/99"]), classes={"exclude": ["purple"]})
    dataset = pull(job, workspace)
    with pytest.raises(DataError, match=r"1 line without an image of the dataset: blue/99"):
        fetch_dataset(dataset, job, workspace)


def test_changed_list_changes_the_keys_of_training(write_lists, make_list_job, workspace):
    job = make_list_job(write_lists())
    dataset = pull(job, workspace)
    fingerprint = dataset.metadata.fingerprint
    before = stage_keys(job, fingerprint, workspace.storage)
    write_lists(train=["red/18"])
    after = stage_keys(job, fingerprint, workspace.storage)
    assert before.transfer != after.transfer
    # A process uses the lists that it has read first: keys and images agree even if a list changes in between.
    assert stage_keys(job, fingerprint, workspace.storage, dataset.inputs) == before
    assert fetch_dataset(dataset, job, workspace).train.size == 20
    again = find_pulled_dataset(job, workspace)
    assert again.prefix == dataset.prefix
    assert stage_keys(job, fingerprint, workspace.storage, again.inputs) == after
    assert fetch_dataset(again, job, workspace).train.size == 21
    write_lists()
    assert stage_keys(job, fingerprint, workspace.storage) == before


def test_local_lists_have_the_same_keys_as_lists_in_storage(write_lists, make_list_job, workspace, tmp_path):
    job = make_list_job(write_lists())
    paths = {}
    for split, part in job.spec.dataset.split_settings.lists.items():
        (tmp_path / f"{split}.txt").write_bytes(workspace.storage.read(part.removeprefix(f"{workspace.storage.uri}/")))
        paths[split] = {"list": str(tmp_path / f"{split}.txt")}
    local = make_list_job(paths)
    check_splits(fetch_dataset(pull(local, workspace), local, workspace))
    before = stage_keys(local, "0" * 16, workspace.storage).transfer
    (tmp_path / "train.txt").write_text("blue/01\nred/01")
    assert stage_keys(local, "0" * 16, workspace.storage).transfer != before


def test_missing_list_fails_before_any_image_is_pulled(write_lists, make_list_job, workspace):
    splits = write_lists() | {"test": {"list": workspace.storage.uri_of("lists/none.txt")}}
    with pytest.raises(
        DataError, match=r"^spec\.dataset\.splits\.test\.list is s3://.*none\.txt, which does not exist"
    ):
        pull(make_list_job(splits), workspace)
    assert not list(workspace.storage.list("datasets/"))
