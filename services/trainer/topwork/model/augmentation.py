"""Augments training images; the result depends only on the images and an explicit seed per step."""

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from topwork.spec.model import Augmentation

# Maps images float32 (batch, height, width, 3) in 0..255, one-hot labels float32 (batch, classes) and a seed int32 (2,)
# to augmented images and labels.
Augment = Callable[[tf.Tensor, tf.Tensor, tf.Tensor], tuple[tf.Tensor, tf.Tensor]]


def build_augmentation(settings: Augmentation) -> Augment | None:
    """Build the function that augments a batch of training images as specified in `spec.augmentation`.

    The function is stateless: the same images and seed give the same result, in any process and at any step.
    MixUp and CutMix also mix the labels.

    Args:
        settings: Kinds and strengths of the augmentations.

    Returns:
        A function of (images float32 (batch, height, width, 3) in 0..255, one-hot labels float32 (batch, classes),
        seed int32 (2,)) to augmented images and labels of the same shapes, or None without augmentation.
    """
    layers = _layers(settings)
    if not layers:
        return None

    def apply(images: tf.Tensor, one_hot: tf.Tensor, seed: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        seeds = _StepSeed(seed)
        for layer in layers:
            if isinstance(layer, keras.layers.RandAugment):
                # RandAugment ignores the seed argument and uses its own generator. Bypass Keras' attribute tracking,
                # which would keep a tensor of one graph for the next.
                object.__setattr__(layer, "generator", seeds)
            transformation = layer.get_random_transformation(images, training=True, seed=seeds)
            images = layer.transform_images(images, transformation, training=True)
            one_hot = layer.transform_labels(one_hot, transformation, training=True)
        return tf.clip_by_value(images, 0.0, 255.0), one_hot

    return apply


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
        cut_mix = layers.CutMix()
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
