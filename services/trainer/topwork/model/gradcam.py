"""Grad-CAM: where an image raises the score of a class, seen through the last feature maps of a classifier.

Selvaraju et al. 2017, "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization", and the
recipe of Keras (https://keras.io/examples/vision/grad_cam) average the gradient of the score over each feature map.
Here it is not averaged, as proposed by Draelos and Carin 2020, "Use HiResCAM instead of Grad-CAM for faithful
explanations of convolutional neural networks". With average pooling, the gradient is the same everywhere in a map, and
the result is that of the recipe. With max pooling or a flattened map, the average mixes places that raise the score
with others.
"""

from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from topwork.model.cloning import as_functional
from topwork.model.device_memory import predict_in_parts
from topwork.model.layer_tree import leaf_layers
from topwork.model.partition import split_after, trace_paths


@dataclass(frozen=True)
class FeatureMaps:
    """A classifier, split at its last feature maps. Both parts share the layers of the classifier.

    Attributes:
        below: From images float32 (batch, height, width, 3) to maps (batch, rows, columns, channels).
        above: From these maps to logits.
    """

    below: keras.Model
    above: keras.Model

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns of the maps."""
        rows, columns = self.below.output_shape[1:3]
        return rows, columns


def find_feature_maps(model: keras.Model) -> FeatureMaps | None:
    """Split a model at its last feature maps that all paths go through, which may be inside of a nested model.

    Args:
        model: Functional or sequential model, such as a classifier from images to logits.

    Returns:
        The parts; None if the model has no such maps with more than one row and column, above a layer with weights, or
        if some of its maps have the channels first: rows and columns could be mistaken.
    """
    if any(getattr(layer, "data_format", None) == "channels_first" for layer in leaf_layers(model)):
        return None
    graph = as_functional(model)
    for layer in reversed(_bottlenecks_above_weights(graph)):
        if _is_map(layer.output.shape):
            return FeatureMaps(*split_after(graph, layer))
        if isinstance(layer, keras.Model) and (inner := find_feature_maps(layer)):
            return FeatureMaps(*split_after(graph, layer, (inner.below, inner.above)))
    return None


def compute_heat_maps(
    parts: FeatureMaps, images: NDArray[np.uint8], labels: NDArray[np.int64], batch_size: int
) -> NDArray[np.float32]:
    """Compute where each image raises the logit of a class.

    The heat is the sum of all maps, each times the gradient of the logit by it, where this sum is positive.

    Args:
        parts: The classifier, split by `find_feature_maps`.
        images: uint8 (n, height, width, 3).
        labels: int64 (n,), the class to explain of each image.
        batch_size: Number of images that are predicted at once.

    Returns:
        float32 (n, rows, columns) in 0..1. The highest value of an image is 1; all are 0 if nothing in the image raises
        the logit.
    """

    # Not compiled: tracing a graph takes longer than these few images.
    def heat_of(rows: NDArray[np.int64]) -> NDArray[np.float32]:
        maps = parts.below(tf.cast(images[rows], tf.float32), training=False)
        with tf.GradientTape() as tape:
            tape.watch(maps)
            scores = _class_logits(parts.above(maps, training=False), tf.constant(labels[rows]))
        heat: NDArray[np.float32] = tf.nn.relu(tf.reduce_sum(tape.gradient(scores, maps) * maps, axis=-1)).numpy()
        return heat

    batches = np.split(np.arange(len(images)), range(batch_size, len(images), batch_size))
    heat_maps = np.concatenate([predict_in_parts(heat_of)(rows) for rows in batches])
    highest = heat_maps.max(axis=(1, 2), keepdims=True)
    is_hot = (highest > 0) & np.isfinite(highest)
    scaled: NDArray[np.float32] = np.divide(heat_maps, highest, out=np.zeros_like(heat_maps), where=is_hot)
    return scaled


def _bottlenecks_above_weights(model: keras.Model) -> list[Any]:
    found, has_weights = [], False
    for layer, is_bottleneck in trace_paths(model):
        has_weights |= bool(layer.weights)
        if has_weights and is_bottleneck:
            found.append(layer)
    return found


def _is_map(shape: tuple[int | None, ...]) -> bool:
    return len(shape) == 4 and all(side is not None and side > 1 for side in shape[1:3])


def _class_logits(logits: tf.Tensor, classes: tf.Tensor) -> tf.Tensor:
    """Return the logit of one class of each image; that of class 0 of two classes is the negative of the only logit."""
    if logits.shape[-1] == 1:
        return tf.where(classes == 1, logits[:, 0], -logits[:, 0])
    return tf.gather(logits, classes, batch_dims=1)
