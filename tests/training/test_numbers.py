"""Losses and weights that are no numbers, and images that can't be trained on: told exactly, and in time."""

import re

import keras
import numpy as np
import pytest
from PIL import Image

from topwork.errors import DataError
from topwork.stages.fine_tune import fine_tune
from topwork.stages.pull import pull
from topwork.stages.transfer import transfer

# Pixels of the pictures are below 160 on the average of their channels: what the base makes of them is below 1.
WHITE, GRAY = 255, 248


@pytest.fixture
def exploding(workspace):
    """A base whose last layer overflows where an image is white, and nearly does where it is gray."""
    convolution = keras.layers.Conv2D(
        2, 1, activation="exponential", kernel_initializer=keras.initializers.Constant(1 / 3)
    )
    model = keras.Sequential([keras.Input((32, 32, 3)), convolution])
    convolution.bias.assign(np.full(2, -160.0))
    path = workspace.scratch / "exploding.keras"
    model.save(path)
    return {"base": {"saved": {"uri": str(path), "cutAt": -1}}, "head": {"dropout": 0.0, "pooling": "max"}}


def paint(folder, name, level):
    Image.fromarray(np.full((40, 36, 3), level, np.uint8)).save(folder / name)


def splits(dataset, **slices):
    return {**dataset.model_dump(by_alias=True, mode="json", exclude_unset=True), "splits": slices}


@pytest.mark.parametrize("cache", ["off", "on"])
def test_the_step_and_the_images_of_a_loss_that_is_lost_are_named(
    make_job, workspace, two_class_folder, exploding, cache
):
    paint(two_class_folder / "red", "white.png", WHITE)
    job = make_job(
        model=exploding,
        dataset=splits(make_job().spec.dataset, train="train[:35]", validation="train[35:]"),
        transfer={"epochs": 2, "batchSize": 4, "featureCache": cache},
        compute={"gpus": 0, "checkpointMinutes": 1e-6},
        seed=2,
    )
    dataset = pull(job, workspace)
    with pytest.raises(
        DataError, match=r"come apart\. Take a smaller learningRate .* last good checkpoint is"
    ) as raised:
        transfer(job, dataset, workspace)
    said = re.match(r"The loss is (?:nan|inf) in epoch (\d) at step (\d): .* odd: (.*)\. The last", str(raised.value))
    epoch, step, names = int(said[1]), int(said[2]), said[3].split(", ")
    assert (epoch, step) > (1, 1)
    assert len(names) == 4
    # No other image could have done it.
    assert "red/white.png" in names
    keys = [stored.key for stored in workspace.storage.list(f"runs/{job.run}/transfer/checkpoints/")]
    kept = [key.split("/")[-2] for key in keys if key.endswith("manifest.json")]
    assert kept
    assert max(kept) < f"{epoch - 1:05}-{step:07}"


def test_images_of_the_validation_split_without_a_loss_are_named(make_job, workspace, two_class_folder, exploding):
    paint(two_class_folder / "red", "white.png", WHITE)
    # With this seed the white image is in the slice that is validated on.
    job = make_job(
        model=exploding,
        dataset=splits(make_job().spec.dataset, train="train[35:]+train[:20]", validation="train[20:35]"),
        transfer={"epochs": 2, "batchSize": 4},
        seed=5,
    )
    with pytest.raises(
        DataError, match=r"The loss is (nan|inf) on 1 of 15 validation images: .* odd: red/white\.png\."
    ):
        transfer(job, pull(job, workspace), workspace)


def test_no_checkpoint_is_stored_of_weights_that_are_no_numbers(make_job, workspace, two_class_folder, exploding):
    # Half of them are on the wrong side of the head at its start: their gradient is too large for a weight.
    for index in range(8):
        paint(two_class_folder / ("red", "blue")[index % 2], f"gray-{index}.png", GRAY)
    job = make_job(
        model=exploding,
        dataset=splits(make_job().spec.dataset, train="train[:38]", validation="train[38:]"),
        transfer={
            "epochs": 1, "batchSize": 1, "featureCache": "off", "optimizer": {"name": "sgd", "learningRate": 10.0},
        },
        compute={"gpus": 0, "checkpointMinutes": 1e-6},
    )  # fmt: skip
    with pytest.raises(
        DataError, match=r"Weights are no numbers any more in epoch 1 after step \d+: .* odd: (red|blue)/gray-\d\.png\."
    ):
        transfer(job, pull(job, workspace), workspace)


REFUSED = [
    (
        {"dataset": {"train": "train[:6]", "validation": "train[6:]"}, "transfer": {"batchSize": 8}},
        "The training split has 6 images, fewer than spec.transfer.batchSize 8: not one whole batch. Use a batchSize "
        "of at most 6, or more images in spec.dataset.splits.train.",
    ),
    (
        {
            "dataset": {"train": "train[:10]", "validation": "train[10:]"},
            "fineTune": {"epochs": 1, "unfreeze": "all", "batchSize": 16, "optimizer": {"learningRate": 1e-5}},
        },
        "The training split has 10 images, fewer than spec.fineTune.batchSize 16: not one whole batch. Use a batchSize "
        "of at most 10, or more images in spec.dataset.splits.train.",
    ),
    (
        {"dataset": {"train": "train[1:]", "validation": "train[:1]"}},
        "The validation split holds no image of {missing}. Enlarge spec.dataset.splits.validation, give counts with "
        "splits.perClass, leave the class out of the source, or evaluate without it: spec.dataset.onMissingClass: "
        "allow.",
    ),
    (
        {"dataset": {"train": "train[1:]", "test": "train[:1]"}},
        "The test split holds no image of {missing}. Enlarge spec.dataset.splits.test, give counts with "
        "splits.perClass, leave the class out of the source, or evaluate without it: spec.dataset.onMissingClass: "
        "allow.",
    ),
    (
        {"dataset": {"train": "train[:1]", "validation": "train[1:]"}, "transfer": {"batchSize": 1}},
        "The training split holds no image of {missing}. Enlarge spec.dataset.splits.train, give counts with "
        "splits.perClass, or leave the class out of the source.",
    ),
    (
        {"dataset": {"train": "train[:39]", "validation": "train[40:]"}},
        "spec.dataset.splits.validation: train[40:] holds no image: train has 40 images. Widen the slice.",
    ),
]


@pytest.mark.parametrize(
    ("changes", "expected"),
    REFUSED,
    ids=["batch", "batch-of-fine-tune", "class-validation", "class-test", "class-train", "empty"],
)
def test_images_that_can_not_be_trained_on_are_refused_before_training(make_job, workspace, changes, expected):
    changes = {"transfer": {"batchSize": 2}, **changes}
    transfer_settings = {"train": "all", "epochs": 1, "featureCache": "off", **changes["transfer"]}
    dataset = splits(make_job().spec.dataset, **changes["dataset"])
    job = make_job(**{**changes, "dataset": dataset, "transfer": transfer_settings})
    with pytest.raises(DataError) as raised:
        stored = pull(job, workspace)
        fine_tune(job, transfer(job, stored, workspace), stored, workspace)
    assert str(raised.value) in {expected.replace("{missing}", name) for name in ("blue", "red")}
    assert not [stored.key for stored in workspace.storage.list(f"runs/{job.run}/") if "checkpoints" in stored.key]


def test_a_source_of_one_class_or_without_a_usable_image_is_refused_before_training(
    make_job, workspace, two_class_folder
):
    job = make_job()
    for path in (two_class_folder / "red").iterdir():
        path.write_bytes(b"no image")
    with pytest.raises(
        DataError, match=r"50\.0% of the images of .* can't be used, more than spec\.dataset\.maxRejectedRatio"
    ):
        pull(job, workspace)
    for path in (two_class_folder / "blue").iterdir():
        path.write_bytes(b"no image")
    with pytest.raises(DataError, match=r"Not one image of the split train can be used\. 40 left out: blue/00\.jpg"):
        pull(job, workspace)
    for path in (two_class_folder / "red").iterdir():
        path.unlink()
    with pytest.raises(DataError, match="holds one class only, blue: a classifier needs two or more"):
        pull(job, workspace)
