"""The pull stage against a real S3 server."""

import dataclasses
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from PIL import Image

from topwork.artifacts import fetch_whole, read_manifest
from topwork.cancellation import StopNow
from topwork.data import local_dataset
from topwork.data.local_dataset import fetch
from topwork.errors import DataError
from topwork.progress import Quiet
from topwork.stages.pull import pull


class _Listening(Quiet):
    """Keeps what is said."""

    def __init__(self, said):
        self._said = said

    def note(self, message, **facts):
        self._said[message] = facts


def test_pull_stores_a_folder_and_a_second_pull_takes_nothing_from_the_source(make_job, workspace, two_class_folder):
    (two_class_folder / "red" / "notes.txt").write_text("not an image")
    stored = pull(make_job(), workspace)

    assert stored.facts.class_names == ("blue", "red")
    assert stored.facts.splits == {"train": {"blue": 20, "red": 20}}
    assert [(image.name, image.reason) for image in stored.facts.rejected] == [("red/notes.txt", "unknown format")]
    assert stored.prefix == f"datasets/photos/{stored.facts.fingerprint}"
    before = {found.key: found.etag for found in workspace.storage.list()}
    assert pull(make_job(), workspace) == stored
    assert {found.key: found.etag for found in workspace.storage.list()} == before


def test_a_run_keeps_its_images_when_its_source_changes_and_a_new_run_takes_the_new_ones(
    make_job, workspace, two_class_folder
):
    stored = pull(make_job(), workspace)
    (two_class_folder / "red" / "00.jpg").unlink()
    assert pull(make_job(), workspace) == stored
    assert pull(make_job(seed=7), workspace).facts.images == 39


def test_the_stored_dataset_is_read_by_plain_tfds(make_job, workspace, two_class_folder, tmp_path):
    stored = pull(make_job(), workspace)
    fetch_whole(workspace.storage, stored.prefix, tmp_path / "plain")

    builder = tfds.builder_from_directory(tmp_path / "plain")
    assert builder.info.features["label"].names == ["blue", "red"]
    examples = list(builder.as_dataset(split="train").as_numpy_iterator())
    assert len(examples) == 40
    for example in examples:
        name = example["name"].decode()
        with Image.open(two_class_folder / name) as image:
            assert np.abs(np.asarray(image).astype(int) - example["image"]).mean() < 2
        assert name.startswith(builder.info.features["label"].int2str(example["label"]))


def test_records_are_the_same_bytes_in_every_process(make_job, workspace, tmp_path):
    stored = pull(make_job(), workspace)
    fetch_whole(workspace.storage, stored.prefix, tmp_path / "dataset")
    (file,) = (tmp_path / "dataset").glob("*.tfrecord*")
    for record in tf.data.TFRecordDataset(str(file)).as_numpy_iterator():
        # Left to itself, protobuf writes the features in another order in each process.
        assert tf.train.Example.FromString(record).SerializeToString(deterministic=True) == record


def test_fetch_gives_the_splits_of_the_spec(make_job, workspace):
    job = make_job()
    dataset = fetch(pull(job, workspace), job, workspace)

    assert (dataset.train.size, dataset.validation.size, dataset.test.size) == (24, 8, 8)
    for split in (dataset.train, dataset.validation, dataset.test):
        images = split.images(np.arange(split.size))
        assert images.shape == (split.size, 32, 32, 3)
        assert images.dtype == np.uint8
        # Red pictures are red and blue ones blue: labels belong to their images.
        assert (images[..., 0].mean(axis=(1, 2)) > images[..., 2].mean(axis=(1, 2))).astype(int).tolist() == (
            split.labels.tolist()
        )
        assert [name.split("/")[0] for name in split.names] == [dataset.class_names[label] for label in split.labels]


def test_images_decoded_on_the_fly_are_those_kept_on_scratch(make_job, workspace, monkeypatch):
    from topwork.data.batches import evaluation_batches

    job = make_job()
    stored = pull(job, workspace)
    kept = fetch(stored, job, workspace)
    again = fetch(stored, job, workspace)  # from what the first left on scratch
    monkeypatch.setattr(local_dataset, "_SHARE", 0.0)
    on_the_fly = fetch(stored, job, workspace)

    order = np.array([5, 0, 23, 5])
    assert (kept.train.images(order) == on_the_fly.train.images(order)).all()
    assert (kept.train.images(order) == again.train.images(order)).all()
    batches = [
        np.concatenate([images.numpy() for images, _, _ in evaluation_batches(split, classes=2, batch_size=5)])
        for split in (kept.train, on_the_fly.train)
    ]
    assert (batches[0] == batches[1]).all()
    assert (batches[0][:24] == kept.train.images(np.arange(24))).all()


def test_duplicates_across_splits_are_reported(make_job, workspace, two_class_folder):
    for name in ("a", "b", "c"):
        Image.new("RGB", (40, 36), "red").save(two_class_folder / "red" / f"{name}.bmp")
    said = {}
    workspace = dataclasses.replace(workspace, progress=_Listening(said))
    job = make_job()
    stored = pull(job, workspace)
    assert stored.facts.duplicates == 2
    assert said["dataset"] == {
        "name": "photos",
        "images": 43,
        "classes": 2,
        "imbalance": 1.15,
        "duplicates": 2,
        "rejected": 0,
    }
    assert said["images of each class"] == {"counts": "blue 20, red 23"}
    dataset = fetch(stored, job, workspace)
    digests = {name: set(getattr(dataset, name).digests.tolist()) for name in ("train", "validation", "test")}
    crossing = digests["train"] & digests["test"] | digests["train"] & digests["validation"]
    assert ("duplicates across splits" in said) == bool(crossing | digests["validation"] & digests["test"])


def test_too_many_rejected_images_fail_before_anything_is_visible(make_job, workspace, two_class_folder):
    for index in range(30):
        (two_class_folder / "red" / f"broken-{index:02}.jpg").write_bytes(b"broken")
    with pytest.raises(DataError) as failed:
        pull(make_job(), workspace)
    assert str(failed.value).startswith(
        f"42.9% of the images of {two_class_folder} can't be used, more than spec.dataset.maxRejectedRatio 0.2 allows. "
        "30 left out: "
        "red/broken-00.jpg (unknown format); red/broken-01.jpg (unknown format); "
    )
    assert str(failed.value).endswith("red/broken-19.jpg (unknown format); and 10 more.")
    assert list(workspace.storage.list()) == []
    assert 'topwork_images_rejected_total{reason="unknown format"} 30.0' in _exposed(workspace)


def test_one_rejected_image_fails_where_the_spec_says_so_also_in_a_dataset_that_is_found(
    make_job, workspace, two_class_folder
):
    (two_class_folder / "red" / "empty.jpg").touch()
    job = make_job()
    strict = make_job(dataset={**job.spec.dataset.model_dump(by_alias=True), "onCorruptImage": "fail"})
    message = r"onCorruptImage is fail, and not every image can be used\. 1 left out: red/empty\.jpg \(empty\)"
    with pytest.raises(DataError, match=message):
        pull(strict, workspace)
    assert list(workspace.storage.list()) == []
    pull(job, workspace)
    with pytest.raises(DataError, match=message):
        pull(strict, workspace)


def test_one_class_is_not_enough(make_job, workspace, two_class_folder):
    (two_class_folder / "red").rename(two_class_folder / "blue" / "red")
    with pytest.raises(DataError, match="holds one class only, blue: a classifier needs two or more"):
        pull(make_job(), workspace)


def test_splits_that_do_not_fit_fail_in_the_pull(make_job, workspace, two_class_folder):
    job = make_job()
    dataset = {**job.spec.dataset.model_dump(by_alias=True), "splits": {"perClass": {"train": 20, "test": 5}}}
    with pytest.raises(DataError, match=r"asks for 25 images of each class .*, but blue has 20, red has 20"):
        pull(make_job(dataset=dataset), workspace)


def test_two_pulls_at_once_end_with_one(make_job, workspace, tmp_path):
    one = dataclasses.replace(workspace, scratch=tmp_path / "one")
    other = dataclasses.replace(workspace, scratch=tmp_path / "other")
    with ThreadPoolExecutor(2) as pool:
        stored = list(pool.map(lambda each: pull(make_job(), each), (one, other)))
    assert stored[0] == stored[1]
    keys = [found.key for found in workspace.storage.list("datasets/")]
    assert len(keys) == 5  # one shard, three TFDS descriptions and the manifest
    assert fetch(stored[0], make_job(), one).train.size == 24


def test_the_stored_files_depend_on_the_source_alone(make_job, workspace, tmp_path):
    elsewhere = workspace.storage.at(f"{workspace.storage.uri}/elsewhere")
    other = dataclasses.replace(workspace, storage=elsewhere, scratch=tmp_path / "other")
    one, same = (read_manifest(each.storage, pull(make_job(), each).prefix) for each in (workspace, other))
    assert one == same


def test_a_pull_that_was_killed_is_done_again_over_what_it_left(make_job, workspace):
    job = make_job()
    stored = pull(job, workspace)
    # What a kill between two uploads leaves: files without a manifest, one of them cut short.
    workspace.storage.delete([f"{stored.prefix}/manifest.json"])
    shard = f"{stored.prefix}/stored_images-train.tfrecord-00000-of-00001"
    workspace.storage.write(shard, b"half")
    (workspace.scratch / "pull" / stored.facts.fingerprint / "building").mkdir(parents=True)

    assert pull(job, workspace) == stored
    assert fetch(stored, job, workspace).train.size == 24


class _Impatient(Quiet):
    """Asks to stop, as a signal would, when some images are proved."""

    def __init__(self, stop):
        self._stop = stop
        self._left = 10

    @contextmanager
    def track(self, what, total):
        yield self

    def advance(self, count=1, **facts):
        self._left -= count
        if not self._left:
            self._stop.ask()


def test_a_pull_that_is_asked_to_stop_leaves_nothing_behind(make_job, workspace):
    impatient = dataclasses.replace(workspace, progress=_Impatient(workspace.stop))
    with pytest.raises(StopNow):
        pull(make_job(), impatient)
    assert list(workspace.scratch.rglob("*.*")) == []
    assert list(workspace.storage.list()) == []


def _exposed(workspace):
    from prometheus_client import generate_latest

    return generate_latest(workspace.metrics.registry).decode()


def test_file_names_that_are_no_utf_8_are_made_printable(make_job, workspace, two_class_folder):
    for name, data in (
        (b"\xff-empty.jpg", b""),
        (b"\xfe-whole.jpg", (two_class_folder / "red" / "00.jpg").read_bytes()),
    ):
        (two_class_folder / "red" / os.fsdecode(name)).write_bytes(data)
    job = make_job()
    stored = pull(job, workspace)
    assert [image.name for image in stored.facts.rejected] == ["red/?-empty.jpg"]
    dataset = fetch(stored, job, workspace)
    names = [name for split in (dataset.train, dataset.validation, dataset.test) for name in split.names]
    assert "red/?-whole.jpg" in names
