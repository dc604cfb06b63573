"""Versions with the test set of an earlier version, from publishing to publishing."""

import csv
import gzip
import io
import json
import shutil

import numpy as np
import pytest
from PIL import Image
from structlog.testing import capture_logs
from tests.training import test_publish

from topwork.artifacts import write_artifact
from topwork.data.local_dataset import fetch_dataset
from topwork.errors import DataError
from topwork.registry import evaluated_images
from topwork.registry.stage_keys import stage_keys
from topwork.stages.publish import publish
from topwork.stages.pull import pull

store_classifier = test_publish.store_classifier
STATEMENT = "The test split is the test set of version 1 (8 images)."


@pytest.fixture
def make_split_job(make_job, two_class_folder):
    def make(splits, **settings):
        source = {"folder": {"uri": str(two_class_folder)}}
        return make_job(dataset={"source": source, "splits": splits, "imageSize": [32, 32]}, **settings)

    return make


@pytest.fixture
def publish_job(workspace, store_classifier, export_check_in_process):
    def run(job):
        return publish(job, store_classifier(job), pull(job, workspace), workspace)

    return run


def rows(storage, version):
    content = storage.read(f"models/tiny/{version}/{evaluated_images.FILE}")
    return list(csv.reader(io.StringIO(gzip.decompress(content).decode())))


def grow(folder, step):
    """Rename all images, and add new ones and copies with the same pixels."""
    for path in sorted(folder.rglob("*.*")):
        path.rename(path.with_name(f"step{step}-{path.name}"))
    random = np.random.default_rng(step)
    for name in ("blue", "red"):
        for path in sorted((folder / name).iterdir())[:12]:
            shutil.copy(path, path.with_name(f"copy{step}-{path.name}"))
        for number in range(4):
            pixels = random.integers(0, 255, (40, 36, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"new{step}-{number}.png")


def test_versions_are_evaluated_on_the_same_images_while_the_dataset_grows(
    make_split_job, publish_job, workspace, two_class_folder
):
    storage = workspace.storage
    first = publish_job(make_split_job({"train": 0.6, "validation": 0.2, "test": 0.2}))
    assert (first.version, first.images) == (1, 8)
    grow(two_class_folder, 1)
    # The test images are stored with the version: its dataset may be deleted.
    storage.delete([stored.key for stored in list(storage.list("datasets/"))])
    job = make_split_job({"train": 0.8, "validation": 0.2, "pinTest": 1})
    with capture_logs() as logs:
        second = publish_job(job)
    assert (second.version, second.images) == (2, 8)
    assert sorted(row[:2] for row in rows(storage, 2)) == sorted(row[:2] for row in rows(storage, 1))
    assert STATEMENT in [entry.get("note") for entry in logs if entry["event"] == "splits"]
    assert STATEMENT.replace("(", r"\(").replace(")", r"\)") in storage.read("models/tiny/2/card.md").decode()
    assert STATEMENT in storage.read("models/tiny/2/report.html").decode()
    # Version 2 can be pinned in turn, and the images of train and validation are others.
    grow(two_class_folder, 2)
    job = make_split_job({"train": 0.8, "validation": 0.2, "pinTest": 2})
    local = fetch_dataset(pull(job, workspace), job, workspace)
    held_out = {int(digest, 16) for digest, *_ in rows(storage, 1)}
    assert set(local.test.digests.tolist()) == held_out
    assert not held_out & {*local.train.digests.tolist(), *local.validation.digests.tolist()}
    unused = len(list(two_class_folder.rglob("*.*"))) - local.train.size - local.validation.size - local.test.size
    assert local.notes[1] == f"Not used: {unused} images with the same pixels as an image of the test set."


def test_pinned_version_and_its_images_are_part_of_the_keys(make_split_job, publish_job, workspace):
    plain = make_split_job({"train": 0.6, "validation": 0.2, "test": 0.2})
    publish_job(plain)
    splits = {"train": 0.8, "validation": 0.2}
    pinned, unpinned = make_split_job(splits | {"pinTest": 1}), make_split_job(splits)
    storage = workspace.storage
    before = stage_keys(pinned, "0" * 16, storage).transfer
    assert before != stage_keys(unpinned, "0" * 16, storage).transfer
    # Another model with the same number of versions has other images.
    other = make_split_job({"train": 0.6, "validation": 0.2, "test": 0.2}, publish={"name": "other"}, seed=7)
    publish_job(other)
    of_other = make_split_job(splits | {"pinTest": 1}, publish={"name": "other"})
    assert stage_keys(of_other, "0" * 16, storage).transfer != before


def test_removed_test_images_fail_the_job_before_training(make_split_job, publish_job, workspace, two_class_folder):
    publish_job(make_split_job({"train": 0.6, "validation": 0.2, "test": 0.2}))
    name = rows(workspace.storage, 1)[0][2]
    shutil.move(two_class_folder / name, two_class_folder.parent / "removed.png")
    job = make_split_job({"train": 0.8, "validation": 0.2, "pinTest": 1})
    with pytest.raises(DataError, match=rf"1 of 8 images are missing: {name}"):
        fetch_dataset(pull(job, workspace), job, workspace)


def test_versions_without_a_test_set_are_rejected(make_split_job, publish_job, workspace, tmp_path):
    job = make_split_job({"train": 0.8, "validation": 0.2, "pinTest": 3})
    with pytest.raises(DataError, match=r"has no version 3 of the model tiny\. Published versions: none\."):
        pull(job, workspace)
    assert not list(workspace.storage.list("datasets/"))
    publish_job(make_split_job({"train": 0.8, "validation": 0.2}))
    with pytest.raises(DataError, match=r"has no version 3 of the model tiny\. Published versions: 1\."):
        pull(job, workspace)
    with pytest.raises(DataError, match="version 1 of tiny has no test split: its metrics are those of valid"):
        pull(make_split_job({"train": 0.8, "validation": 0.2, "pinTest": 1}), workspace)
    facts = json.loads(workspace.storage.read("models/tiny/latest.json")) | {"version": 2, "split": "test"}
    (tmp_path / "older").mkdir()
    write_artifact(workspace.storage, "models/tiny/2", tmp_path / "older", facts)
    with pytest.raises(DataError, match="version 2 of tiny was published by an older topwork, which did not store"):
        pull(make_split_job({"train": 0.8, "validation": 0.2, "pinTest": 2}), workspace)
