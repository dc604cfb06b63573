"""The pull stage against a real S3 server."""

import dataclasses
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import combinations

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from PIL import Image
from structlog.testing import capture_logs

from topwork.artifacts import download_artifact, read_manifest
from topwork.cancellation import StopInterrupt
from topwork.cli.output.progress import NoProgress
from topwork.data import local_dataset
from topwork.data.local_dataset import fetch_dataset
from topwork.errors import DataError
from topwork.stages.pull import pull


def test_pull_stores_a_dataset_that_a_second_pull_reuses(make_job, workspace, two_class_folder):
    (two_class_folder / "red" / "notes.txt").write_text("not an image")
    stored = pull(make_job(), workspace)

    assert stored.metadata.class_names == ("blue", "red")
    assert stored.metadata.splits == {"train": {"blue": 20, "red": 20}}
    assert [(image.name, image.reason) for image in stored.metadata.rejected] == [("red/notes.txt", "unknown format")]
    assert stored.prefix == f"datasets/photos/{stored.metadata.fingerprint}"
    before = {item.key: item.etag for item in workspace.storage.list()}
    assert pull(make_job(), workspace) == stored
    assert {item.key: item.etag for item in workspace.storage.list()} == before


def test_pull_stores_a_new_dataset_when_the_source_has_changed(make_job, workspace, two_class_folder):
    stored = pull(make_job(), workspace)
    assert pull(make_job(seed=7), workspace) == stored
    (two_class_folder / "red" / "00.jpg").unlink()
    changed = pull(make_job(), workspace)
    assert (changed.prefix != stored.prefix, changed.metadata.images) == (True, 39)


def test_tfds_reads_the_stored_dataset(make_job, workspace, two_class_folder, tmp_path):
    stored = pull(make_job(), workspace)
    download_artifact(workspace.storage, stored.prefix, tmp_path / "dataset")

    builder = tfds.builder_from_directory(tmp_path / "dataset")
    assert builder.info.features["label"].names == ["blue", "red"]
    examples = list(builder.as_dataset(split="train").as_numpy_iterator())
    assert len(examples) == 40
    for example in examples:
        name = example["name"].decode()
        with Image.open(two_class_folder / name) as image:
            assert np.abs(np.asarray(image).astype(int) - example["image"]).mean() < 2
        assert name.startswith(builder.info.features["label"].int2str(example["label"]))


def test_pull_writes_features_in_a_fixed_order(make_job, workspace, tmp_path):
    stored = pull(make_job(), workspace)
    download_artifact(workspace.storage, stored.prefix, tmp_path / "dataset")
    (file,) = (tmp_path / "dataset").glob("*.tfrecord*")
    for record in tf.data.TFRecordDataset(str(file)).as_numpy_iterator():
        # By default, protobuf serializes the features in an order that differs between processes.
        assert tf.train.Example.FromString(record).SerializeToString(deterministic=True) == record


def test_fetch_dataset_returns_the_splits_of_the_spec(make_job, workspace):
    job = make_job()
    dataset = fetch_dataset(pull(job, workspace), job, workspace)

    assert (dataset.train.size, dataset.validation.size, dataset.test.size) == (24, 8, 8)
    for split in (dataset.train, dataset.validation, dataset.test):
        images = split.load_images(np.arange(split.size))
        assert images.shape == (split.size, 32, 32, 3)
        assert images.dtype == np.uint8
        # Red images have the label red and blue images blue: images keep their labels.
        assert (images[..., 0].mean(axis=(1, 2)) > images[..., 2].mean(axis=(1, 2))).astype(int).tolist() == (
            split.labels.tolist()
        )
        assert [name.split("/")[0] for name in split.names] == [dataset.class_names[label] for label in split.labels]


def test_split_returns_the_same_images_cached_and_decoded_on_the_fly(make_job, workspace, monkeypatch):
    from topwork.data.batches import evaluation_batches

    job = make_job()
    stored = pull(job, workspace)
    cached = fetch_dataset(stored, job, workspace)
    reopened = fetch_dataset(stored, job, workspace)  # reuses the files on scratch
    monkeypatch.setattr(local_dataset, "_PIXEL_CACHE_MAX_SHARE", 0.0)
    on_the_fly = fetch_dataset(stored, job, workspace)

    order = np.array([5, 0, 23, 5])
    assert (cached.train.load_images(order) == on_the_fly.train.load_images(order)).all()
    assert (cached.train.load_images(order) == reopened.train.load_images(order)).all()
    batches = [
        np.concatenate([images.numpy() for images, _, _ in evaluation_batches(split, classes=2, batch_size=5)])
        for split in (cached.train, on_the_fly.train)
    ]
    assert (batches[0] == batches[1]).all()
    assert (batches[0][:24] == cached.train.load_images(np.arange(24))).all()


# The audit finds near duplicates, too.
UNAUDITED = {"audit": {"nearDuplicates": "off"}}


def test_pull_and_fetch_dataset_log_duplicates(make_job, workspace, two_class_folder):
    for name in ("a", "b", "c"):
        Image.new("RGB", (40, 36), "red").save(two_class_folder / "red" / f"{name}.bmp")
    settings = make_job().spec.dataset.model_dump(by_alias=True, exclude_unset=True, mode="json")
    job = make_job(dataset={**settings, **UNAUDITED})
    with capture_logs() as entries:
        stored = pull(job, workspace)
        dataset = fetch_dataset(stored, job, workspace)
    events = {entry.pop("event"): entry for entry in entries}
    assert stored.metadata.duplicates == 2
    assert events["dataset"] == {
        "log_level": "info",
        "name": "photos",
        "images": 43,
        "classes": 2,
        "imbalance": 1.15,
        "duplicates": 2,
        "rejected": 0,
    }
    assert events["images per class"] == {"log_level": "info", "counts": "blue 20, red 23"}
    digests = {name: getattr(dataset, name).digests for name in ("train", "validation", "test")}
    common = {
        (first, second): int(np.isin(digests[second], digests[first]).sum())
        for first, second in combinations(digests, 2)
    }
    assert any(common.values())
    assert events["splits"]["note"] in dataset.notes
    expected = [f"{count} image" for count in common.values() if count]
    assert [note[: len(start)] for note, start in zip(dataset.notes, expected, strict=True)] == expected


def test_duplicates_across_folds_are_noted(make_job, workspace, two_class_folder):
    for path in list(two_class_folder.rglob("*.*")):
        shutil.copy(path, path.with_name(f"copy-{path.name}"))
    source = make_job().spec.dataset.source.model_dump(mode="json", exclude_none=True)
    job = make_job(dataset={"source": source, "splits": {"folds": 2, "fold": 1}, "imageSize": [32, 32], **UNAUDITED})
    local = fetch_dataset(pull(job, workspace), job, workspace)
    common = int(np.isin(local.test.digests, local.train.digests).sum())
    assert local.notes == (
        f"{common} images of the test split have the same pixels as an image of the train split, so the metrics are "
        "optimistic.",
    )


def test_pull_rejects_a_source_with_too_many_invalid_images_before_storing_anything(
    make_job, workspace, two_class_folder
):
    for index in range(30):
        (two_class_folder / "red" / f"broken-{index:02}.jpg").write_bytes(b"broken")
    with pytest.raises(DataError) as raised:
        pull(make_job(), workspace)
    assert str(raised.value).startswith(
        f"42.9% of the images of {two_class_folder} are invalid, more than spec.dataset.maxRejectedRatio 0.2 allows. "
        "30 rejected: "
        "red/broken-00.jpg (unknown format: begins with b'broken'); red/broken-01.jpg (unknown format: begins with "
    )
    assert str(raised.value).endswith("red/broken-19.jpg (unknown format: begins with b'broken'); and 10 more.")
    assert list(workspace.storage.list()) == []
    assert 'topwork_images_rejected_total{reason="unknown format"} 30.0' in _exposition(workspace)


def test_pull_with_on_corrupt_image_fail_rejects_new_and_stored_datasets_with_invalid_images(
    make_job, workspace, two_class_folder
):
    (two_class_folder / "red" / "empty.jpg").touch()
    job = make_job()
    strict = make_job(dataset={**job.spec.dataset.model_dump(by_alias=True), "onCorruptImage": "fail"})
    message = r"Some images are invalid, and .*onCorruptImage is fail\. 1 rejected: red/empty\.jpg \(empty\)"
    with pytest.raises(DataError, match=message):
        pull(strict, workspace)
    assert list(workspace.storage.list()) == []
    pull(job, workspace)
    with pytest.raises(DataError, match=message):
        pull(strict, workspace)


def test_pull_rejects_a_source_with_one_class(make_job, workspace, two_class_folder):
    (two_class_folder / "red").rename(two_class_folder / "blue" / "red")
    with pytest.raises(DataError, match="contains only one class, blue, but a classifier needs at least two"):
        pull(make_job(), workspace)


def test_pull_rejects_splits_that_the_dataset_cannot_fill(make_job, workspace, two_class_folder):
    job = make_job()
    dataset = {**job.spec.dataset.model_dump(by_alias=True), "splits": {"perClass": {"train": 20, "test": 5}}}
    with pytest.raises(DataError, match=r"requests 25 images per class .*, but blue has 20, red has 20"):
        pull(make_job(dataset=dataset), workspace)


def test_concurrent_pulls_store_one_dataset(make_job, workspace, tmp_path):
    one = dataclasses.replace(workspace, scratch=tmp_path / "one")
    other = dataclasses.replace(workspace, scratch=tmp_path / "other")
    with ThreadPoolExecutor(2) as pool:
        stored = list(pool.map(lambda run_workspace: pull(make_job(), run_workspace), (one, other)))
    assert stored[0] == stored[1]
    keys = [item.key for item in workspace.storage.list("datasets/")]
    # One shard, three TFDS metadata files, a JPEG and a PNG source file, the listing of the source, and the manifest.
    assert len(keys) == 9
    assert fetch_dataset(stored[0], make_job(), one).train.size == 24


def test_pull_writes_files_that_depend_only_on_the_source(make_job, workspace, tmp_path):
    other_storage = workspace.storage.at(f"{workspace.storage.uri}/elsewhere")
    other = dataclasses.replace(workspace, storage=other_storage, scratch=tmp_path / "other")
    first, second = (
        read_manifest(run_workspace.storage, pull(make_job(), run_workspace).prefix)
        for run_workspace in (workspace, other)
    )
    assert first == second


def test_pull_repeats_an_interrupted_pull_and_overwrites_its_files(make_job, workspace):
    job = make_job()
    stored = pull(job, workspace)
    # The state after a kill between two uploads: no manifest, and one truncated file.
    workspace.storage.delete([f"{stored.prefix}/manifest.json"])
    shard = f"{stored.prefix}/stored_images-train.tfrecord-00000-of-00001"
    workspace.storage.write(shard, b"half")
    (workspace.scratch / "pull" / stored.metadata.fingerprint / "building").mkdir(parents=True)

    assert pull(job, workspace) == stored
    assert fetch_dataset(stored, job, workspace).train.size == 24


class _StopAfterTenImages(NoProgress):
    """Requests a stop, as a signal handler does, after ten images."""

    def __init__(self, stop):
        self._stop = stop
        self._left = 10

    @contextmanager
    def track(self, what, total):
        yield self

    def advance(self, count=1, **facts):
        self._left -= count
        if not self._left:
            self._stop.set()


def test_pull_leaves_no_files_when_it_is_stopped(make_job, workspace):
    stopping = dataclasses.replace(workspace, progress=_StopAfterTenImages(workspace.stop))
    with pytest.raises(StopInterrupt):
        pull(make_job(), stopping)
    assert list(workspace.scratch.rglob("*.*")) == []
    assert list(workspace.storage.list()) == []


def _exposition(workspace):
    from prometheus_client import generate_latest

    return generate_latest(workspace.metrics.registry).decode()


def test_pull_replaces_invalid_utf_8_in_file_names(make_job, workspace, two_class_folder):
    for name, data in (
        (b"\xff-empty.jpg", b""),
        (b"\xfe-whole.jpg", (two_class_folder / "red" / "00.jpg").read_bytes()),
    ):
        (two_class_folder / "red" / os.fsdecode(name)).write_bytes(data)
    job = make_job()
    stored = pull(job, workspace)
    assert [image.name for image in stored.metadata.rejected] == ["red/?-empty.jpg"]
    dataset = fetch_dataset(stored, job, workspace)
    names = [name for split in (dataset.train, dataset.validation, dataset.test) for name in split.names]
    assert "red/?-whole.jpg" in names
