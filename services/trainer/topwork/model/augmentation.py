"""Augments training images; the result depends only on the images and an explicit seed per step."""

from typing import Any

import keras
import tensorflow as tf

from topwork.spec.model import Augmentation

_MIXING = (keras.layers.MixUp, keras.layers.CutMix)
# Parts of a transformation that have no row for each image.
_SHARED_BY_BATCH = frozenset({"layer_idxes", "input_shape"})


def build_augmentation(settings: Augmentation) -> "BatchAugmentation | None":
    """Build the augmentation of batches of training images as specified in `spec.augmentation`.

    Args:
        settings: Kinds and strengths of the augmentations.

    Returns:
        The augmentation; None if there is nothing to augment.
    """
    layers = _layers(settings)
    return BatchAugmentation(layers) if layers else None


class BatchAugmentation:
    """Augments a batch of training images, or only the rows of one node.

    It is stateless: the same images and seed give the same result, in any process and at any step. MixUp and CutMix
    also mix the labels. What happens to an image depends on the seed and on its position in the batch of all nodes, so
    it is augmented, and mixed with the same other image, in the same way on any number of nodes. The only exception is
    RandAugment when it equalizes: Keras uses one histogram for all images that it gets, here those of one node.
    """

    def __init__(self, layers: list[Any]) -> None:
        """Apply Keras layers in order; only the last one may mix images."""
        self._layers = layers
        self._is_mixing = isinstance(layers[-1], _MIXING)

    def __call__(self, images: tf.Tensor, one_hot: tf.Tensor, seed: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Augment a whole batch.

        Args:
            images: float32 (batch, height, width, 3) in 0..255.
            one_hot: float32 (batch, classes).
            seed: int32 (2,).

        Returns:
            Augmented images and labels of the same shapes.
        """
        seeds = _StepSeed(seed)
        for layer in self._layers:
            transformation = _draw(layer, images, seeds)
            images = layer.transform_images(images, transformation, training=True)
            one_hot = layer.transform_labels(one_hot, transformation, training=True)
        return tf.clip_by_value(images, 0.0, 255.0), one_hot

    def sources(self, rows: range, batch_size: int, image_size: tuple[int, int], seed: tf.Tensor) -> tf.Tensor:
        """Return which rows of a batch must be read to augment some of its rows.

        Args:
            rows: The rows to augment.
            batch_size: Number of rows of the whole batch.
            image_size: Height and width in pixels.
            seed: int32 (2,).

        Returns:
            int64 (n,), of known shape: positions of the rows themselves. With MixUp and CutMix, those of the rows that
            are mixed into them follow.
        """
        positions = tf.range(rows.start, rows.stop, dtype=tf.int64)
        if not self._is_mixing:
            return positions
        partners = tf.gather(self._draw_batch(batch_size, image_size, seed)[-1]["permutation_order"], positions)
        return tf.concat([positions, tf.cast(partners, tf.int64)], axis=0)

    def rows(
        self, images: tf.Tensor, one_hot: tf.Tensor, rows: range, batch_size: int, seed: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Augment some rows of a batch as in the whole batch.

        Args:
            images: float32 (n, height, width, 3) in 0..255, at the positions of `sources`.
            one_hot: float32 (n, classes), at the same positions.
            rows: The rows to augment.
            batch_size: Number of rows of the whole batch.
            seed: int32 (2,).

        Returns:
            Augmented images and labels of `rows`.
        """
        image_size = (images.shape[1], images.shape[2])
        positions = self.sources(rows, batch_size, image_size, seed)
        transformations = [_take_rows(drawn, positions) for drawn in self._draw_batch(batch_size, image_size, seed)]
        if self._is_mixing:
            # The second half of the images is mixed into the first one.
            transformations[-1]["permutation_order"] = tf.roll(tf.range(2 * len(rows)), len(rows), axis=0)
        for layer, transformation in zip(self._layers, transformations, strict=True):
            images = layer.transform_images(images, transformation, training=True)
            one_hot = layer.transform_labels(one_hot, transformation, training=True)
        return tf.clip_by_value(images[: len(rows)], 0.0, 255.0), one_hot[: len(rows)]

    def _draw_batch(self, batch_size: int, image_size: tuple[int, int], seed: tf.Tensor) -> list[Any]:
        """Draw the random transformation of each layer for a whole batch; it depends only on the shape of the batch."""
        seeds, images = _StepSeed(seed), tf.zeros((batch_size, *image_size, 3))
        return [_draw(layer, images, seeds) for layer in self._layers]


def _draw(layer: Any, images: tf.Tensor, seeds: "_StepSeed") -> Any:
    if isinstance(layer, keras.layers.RandAugment):
        # RandAugment ignores the seed argument and uses its own generator. Bypass Keras' attribute tracking, which
        # would keep a tensor of one graph for the next.
        object.__setattr__(layer, "generator", seeds)
    return layer.get_random_transformation(images, training=True, seed=seeds)


def _take_rows(transformation: Any, positions: tf.Tensor) -> Any:
    """Take the rows of some images from a transformation of a batch, which may consist of several."""
    if isinstance(transformation, dict):
        return {
            name: part if name in _SHARED_BY_BATCH else _take_rows(part, positions)
            for name, part in transformation.items()
        }
    if isinstance(transformation, tuple):
        return tuple(_take_rows(part, positions) for part in transformation)
    return tf.gather(transformation, positions) if tf.is_tensor(transformation) else transformation


class _CutMix(keras.layers.CutMix):
    """CutMix that creates the masks, which are as large as the images, only for the images that it transforms."""

    def _generate_batch_mask(self, images_shape: Any, box_corners: Any) -> tuple[Any, Any]:
        _, mix_weight = super()._generate_batch_mask(images_shape, box_corners)
        return box_corners, mix_weight

    def transform_images(self, images: Any, transformation: Any = None, training: bool = True) -> Any:
        masks, _ = super()._generate_batch_mask(images.shape, transformation["batch_masks"])
        return super().transform_images(images, {**transformation, "batch_masks": masks}, training)


def _layers(settings: Augmentation) -> list[Any]:
    layers = keras.layers
    chosen: list[Any] = []
    if settings.flip != "none":
        chosen.append(layers.RandomFlip("horizontal_and_vertical" if settings.flip == "both" else settings.flip))
    if settings.rotation:
        chosen.append(layers.RandomRotation(settings.rotation))
    if settings.zoom:
        chosen.append(layers.RandomZoom(settings.zoom))
    if settings.translation:
        chosen.append(layers.RandomTranslation(settings.translation, settings.translation))
    if settings.contrast:
        chosen.append(layers.RandomContrast(settings.contrast))
    if settings.brightness:
        chosen.append(layers.RandomBrightness(settings.brightness, value_range=(0, 255)))
    if settings.rand_augment:
        chosen.append(
            layers.RandAugment(num_ops=settings.rand_augment.operations, factor=settings.rand_augment.magnitude)
        )
    if settings.mix_up:
        chosen.append(layers.MixUp(settings.mix_up))
    if settings.cut_mix:
        cut_mix = _CutMix()
        # Keras samples alpha from this range, and its constructor rejects values above 1, which the paper uses.
        cut_mix.factor = (settings.cut_mix, settings.cut_mix)
        chosen.append(cut_mix)
    return chosen


class _StepSeed(keras.random.SeedGenerator):
    """A stateless seed generator: derives a sequence of seeds from the seed of the step."""

    def __init__(self, seed: tf.Tensor) -> None:
        # The constructor of Keras creates a variable, which would be state.
        self._seed = seed
        self._count = 0

    def next(self, ordered: bool = True) -> tf.Tensor:
        self._count += 1
        return tf.random.experimental.stateless_fold_in(self._seed, self._count)
