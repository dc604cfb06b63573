"""Images with identical pixels and different classes, through the pull stage."""

import os
import shutil

import pytest
import tensorflow_datasets as tfds
from structlog.testing import capture_logs

from topwork.artifacts import download_artifact
from topwork.errors import DataError
from topwork.stages.pull import pull


@pytest.fixture
def contradictory_folder(two_class_folder):
    """Two classes with 20 images each; one image of red also occurs twice in blue, and is repeated in red."""
    first = min(os.listdir(two_class_folder / "red"))  # noqa: PTH208
    for name in ("blue/copy-1.png", "blue/copy-2.png", "red/copy.png"):
        shutil.copy(two_class_folder / "red" / first, two_class_folder / name)
    return two_class_folder


def job_with(make_job, folder, **dataset):
    splits = {"train": "train[:60%]", "validation": "train[60%:80%]", "test": "train[80%:]"}
    source = {"folder": {"uri": str(folder)}}
    return make_job(dataset={"source": source, "splits": splits, "imageSize": [32, 32], **dataset})


def test_contradictions_are_dropped_and_reported(make_job, workspace, storage, contradictory_folder, tmp_path):
    with capture_logs() as logs:
        stored = pull(job_with(make_job, contradictory_folder), workspace)
    found = stored.metadata.contradictions
    assert (found.groups, found.images, found.dropped) == (1, 4, True)
    assert {image.name.partition("/")[0] for image in found.examples[0]} == {"blue", "red"}
    assert "blue/copy-1.png (blue)" in found.describe()
    assert [entry["images"] for entry in logs if entry["event"] == "the same image in several classes"] == [4]
    assert stored.metadata.splits == {"train": {"blue": 20, "red": 19}}
    assert (stored.metadata.images, stored.metadata.duplicates) == (39, 0)
    download_artifact(storage, stored.prefix, tmp_path / "dataset")
    builder = tfds.builder_from_directory(tmp_path / "dataset")
    names = [example["name"].decode() for example in tfds.as_numpy(builder.as_dataset(split="train"))]
    assert builder.info.splits["train"].num_examples == len(names) == 39
    assert not [name for name in names if "copy" in name]


def test_contradictions_are_kept_or_fail_as_the_spec_says(make_job, workspace, contradictory_folder):
    kept = pull(job_with(make_job, contradictory_folder, onContradiction="keep"), workspace).metadata
    assert (kept.images, kept.duplicates, kept.contradictions.dropped) == (43, 3, False)
    with pytest.raises(
        DataError, match=r"4 images have the same pixels .* Correct their classes, or set .*onContradic"
    ):
        pull(job_with(make_job, contradictory_folder, onContradiction="fail"), workspace)


def test_dropped_images_count_towards_the_limit_of_rejected_images(make_job, workspace, contradictory_folder):
    with pytest.raises(
        DataError, match=r"9\.3% of the images .*maxRejectedRatio 0\.05 allows.* blue/copy-1\.png \(blue\)"
    ):
        pull(job_with(make_job, contradictory_folder, maxRejectedRatio=0.05), workspace)
