"""Diverged training: NaN and infinite losses and weights are reported with their step and images."""

import re

import keras
import numpy as np
import pytest
from PIL import Image

from topwork.errors import DataError
from topwork.stages.pull import pull
from topwork.stages.transfer import transfer

# The channel mean of every pixel of the other images is below 160: the base maps them to values below 1.
WHITE, GRAY = 255, 248


@pytest.fixture
def overflowing_model(workspace):
    """A base whose last layer overflows for white images, and nearly does for gray ones."""
    convolution = keras.layers.Conv2D(
        2, 1, activation="exponential", kernel_initializer=keras.initializers.Constant(1 / 3)
    )
    model = keras.Sequential([keras.Input((32, 32, 3)), convolution])
    convolution.bias.assign(np.full(2, -160.0))
    path = workspace.scratch / "overflowing.keras"
    model.save(path)
    return {"base": {"saved": {"uri": str(path), "cutAt": -1}}, "head": {"dropout": 0.0, "pooling": "max"}}


def write_uniform_image(directory, name, level):
    Image.fromarray(np.full((40, 36, 3), level, np.uint8)).save(directory / name)


def with_splits(dataset, **slices):
    return {**dataset.model_dump(by_alias=True, mode="json", exclude_unset=True), "splits": slices}


@pytest.mark.parametrize("cache", ["off", "on"])
def test_error_names_step_and_images_of_a_diverged_loss(
    make_job, workspace, two_class_folder, overflowing_model, cache
):
    write_uniform_image(two_class_folder / "red", "white.png", WHITE)
    job = make_job(
        model=overflowing_model,
        dataset=with_splits(make_job().spec.dataset, train="train[:35]", validation="train[35:]"),
        transfer={"epochs": 2, "batchSize": 4, "featureCache": cache},
        compute={"gpus": 0, "checkpointMinutes": 1e-6},
        seed=2,
    )
    dataset = pull(job, workspace)
    with pytest.raises(
        DataError, match=r"training diverged\. Use a smaller learningRate .* last good checkpoint is kept"
    ) as raised:
        transfer(job, dataset, workspace)
    match = re.match(
        r"The loss is (?:nan|inf) in epoch (\d) at step (\d): .* these images: (.*)\. The last", str(raised.value)
    )
    epoch, step, names = int(match[1]), int(match[2]), match[3].split(", ")
    assert (epoch, step) > (1, 1)
    assert len(names) == 4
    # Only this image can cause the divergence.
    assert "red/white.png" in names
    keys = [stored.key for stored in workspace.storage.list("stages/transfer/") if "/checkpoints/" in stored.key]
    checkpoints = [key.split("/")[-2] for key in keys if key.endswith("manifest.json")]
    assert checkpoints
    assert max(checkpoints) < f"{epoch - 1:05}-{step:07}"


def test_error_names_validation_images_with_a_diverged_loss(make_job, workspace, two_class_folder, overflowing_model):
    write_uniform_image(two_class_folder / "red", "white.png", WHITE)
    # With this seed the white image is in the validation slice.
    job = make_job(
        model=overflowing_model,
        dataset=with_splits(make_job().spec.dataset, train="train[35:]+train[:20]", validation="train[20:35]"),
        transfer={"epochs": 2, "batchSize": 4},
        seed=5,
    )
    with pytest.raises(
        DataError, match=r"The loss is (nan|inf) on 1 of 15 validation images: .* these images: red/white\.png\."
    ):
        transfer(job, pull(job, workspace), workspace)


def test_weights_that_became_nan_or_infinite_are_not_stored_in_a_checkpoint(
    make_job, workspace, two_class_folder, overflowing_model
):
    # The initial head misclassifies half of the gray images: their gradient overflows a weight.
    for index in range(8):
        write_uniform_image(two_class_folder / ("red", "blue")[index % 2], f"gray-{index}.png", GRAY)
    job = make_job(
        model=overflowing_model,
        # All gray images are the same, so each class has images that contradict the other one.
        dataset={
            **with_splits(make_job().spec.dataset, train="train[:38]", validation="train[38:]"),
            "onContradiction": "keep",
        },
        transfer={
            "epochs": 1, "batchSize": 1, "featureCache": "off", "optimizer": {"name": "sgd", "learningRate": 10.0},
        },
        compute={"gpus": 0, "checkpointMinutes": 1e-6},
    )  # fmt: skip
    with pytest.raises(
        DataError,
        match=r"Weights became NaN or infinite in epoch 1 after step \d+: .* images: (red|blue)/gray-\d\.png\.",
    ):
        transfer(job, pull(job, workspace), workspace)
