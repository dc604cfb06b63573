"""The pull stage against a real S3 server."""

import numpy as np
import pytest

from topwork.data.local import fetch
from topwork.stages.pull import pull


def test_pull_stores_a_folder_and_a_second_pull_takes_nothing_from_the_source(make_job, workspace, two_class_folder):
    (two_class_folder / "red" / "notes.txt").write_text("not an image")
    stored = pull(make_job(), workspace)

    assert stored.facts.class_names == ("blue", "red")
    assert stored.facts.splits == {"train": {"blue": 20, "red": 20}}
    assert [(image.name, image.reason) for image in stored.facts.rejected] == [("red/notes.txt", "unknown format")]
    assert stored.prefix == f"datasets/photos/{stored.facts.fingerprint}"
    assert pull(make_job(), workspace) == stored


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
