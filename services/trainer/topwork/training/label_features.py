"""Features of all images for the search for label errors: of the pretrained base, or small images without one."""

from collections.abc import Iterator, Sequence

import keras
import numpy as np
import numpy.typing as npt
import structlog
import tensorflow as tf

from topwork.data.batches import evaluation_batches
from topwork.data.local_dataset import Split
from topwork.model.classifier import build_base
from topwork.model.device_memory import predict_in_parts
from topwork.spec import TransferJob
from topwork.training.base_files import fetch_base_file
from topwork.workspace import Workspace

log = structlog.get_logger(__name__)

BATCH_SIZE = 64
PIXELS_SIDE = 16
"""Side of the small images that replace features if the base is not pretrained."""


def compute_label_features(
    job: TransferJob, splits: Sequence[Split], workspace: Workspace
) -> tuple[npt.NDArray[np.float32], str]:
    """Compute the features of all images of some splits.

    Args:
        job: The job, for its base.
        splits: The splits.
        workspace: Storage, progress and scratch.

    Returns:
        float32 (images of all splits, dimensions), and what they are: base or pixels.
    """
    is_pretrained = job.spec.model.base.is_pretrained
    model = _base_model(job, workspace) if is_pretrained else _pixels_model(job.spec.dataset.image_size)
    graph = tf.function(lambda images: model(images, training=False), autograph=False)
    forward = predict_in_parts(lambda images: graph(images).numpy())
    with workspace.track("audit: features", sum(split.size for split in splits)) as tracker:

        def predict() -> Iterator[npt.NDArray[np.float32]]:
            for split in splits:
                for images, _, weights in evaluation_batches(split, classes=1, batch_size=BATCH_SIZE):
                    is_image = weights.numpy() > 0  # the last batch is padded with images of weight 0
                    tracker.advance(int(is_image.sum()))
                    yield forward(images)[is_image]

        features = np.concatenate(list(predict())).astype(np.float32)
    keras.utils.clear_session()
    return features, "base" if is_pretrained else "pixels"


def _base_model(job: TransferJob, workspace: Workspace) -> keras.Model:
    base = build_base(job.spec.model.base, job.spec.dataset.image_size, fetch_base_file(job.spec.model.base, workspace))
    output = base.output
    if len(output.shape) == 4:
        output = keras.layers.GlobalAveragePooling2D()(output)
    return keras.Model(base.image, output)


def _pixels_model(image_size: tuple[int, int]) -> keras.Model:
    image = keras.Input((*image_size, 3))
    small = keras.layers.Resizing(PIXELS_SIDE, PIXELS_SIDE, antialias=True)(image)
    return keras.Model(image, keras.layers.Flatten()(small))
