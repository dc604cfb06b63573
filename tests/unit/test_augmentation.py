"""Augmented training images depend only on the seed of the step and stay within 0..255."""

import numpy as np
import pytest
import tensorflow as tf

from topwork.data.batches import Shard
from topwork.model.augmentation import build_augmentation
from topwork.spec.model import Augmentation

AUGMENTATIONS = {
    "flip": {"flip": "both"},
    "horizontal flip": {"flip": "horizontal"},
    "rotation": {"rotation": 0.2},
    "zoom": {"zoom": 0.4},
    "translation": {"translation": 0.3},
    "contrast": {"contrast": 0.5},
    "brightness": {"brightness": 0.5},
    "randAugment": {"randAugment": {"operations": 2, "magnitude": 0.6}},
    "mixUp": {"mixUp": 0.4},
    "cutMix": {"cutMix": 2.0},
}
MIXED = {"mixUp", "cutMix"}
RANDOM = np.random.default_rng(0)
IMAGES = RANDOM.integers(0, 256, (16, 16, 16, 3)).astype(np.float32)
LABELS = np.eye(4, dtype=np.float32)[np.arange(16) % 4]


def augment_batch(settings, seeds, images=IMAGES):
    """Apply the augmentation in graph mode inside tf.data, as in training."""
    augment = build_augmentation(Augmentation.model_validate(settings))
    dataset = tf.data.Dataset.from_tensor_slices(np.array(seeds, np.int32))
    dataset = dataset.map(lambda seed: augment(tf.constant(images), tf.constant(LABELS), seed), num_parallel_calls=2)
    return [(image.numpy(), label.numpy()) for image, label in dataset]


@pytest.mark.parametrize("kind", AUGMENTATIONS)
def test_augmentation_depends_only_on_the_seed(kind):
    first, again, other = augment_batch(AUGMENTATIONS[kind], [(1, 2), (1, 2), (1, 3)])
    (separate,) = augment_batch(AUGMENTATIONS[kind], [(1, 2)])
    for actual, expected in zip(again, first, strict=True):
        np.testing.assert_array_equal(actual, expected)
    for actual, expected in zip(separate, first, strict=True):
        np.testing.assert_array_equal(actual, expected)
    assert not np.array_equal(first[0], other[0])
    assert not np.array_equal(first[0], IMAGES)


@pytest.mark.parametrize("kind", AUGMENTATIONS)
def test_augmentation_keeps_shapes_and_value_ranges(kind):
    for images, labels in augment_batch(AUGMENTATIONS[kind], [(n, n + 1) for n in range(4)]):
        assert images.shape == IMAGES.shape
        assert images.dtype == np.float32
        assert images.min() >= 0.0
        assert images.max() <= 255.0
        assert np.isfinite(images).all()
        np.testing.assert_allclose(labels.sum(axis=1), 1.0, rtol=1e-5)
        if kind not in MIXED:
            np.testing.assert_array_equal(labels, LABELS)


@pytest.mark.parametrize("kind", sorted(set(AUGMENTATIONS) - MIXED))
def test_each_image_is_augmented_differently(kind):
    copies = np.repeat(IMAGES[:1], 16, axis=0)
    ((images, _),) = augment_batch(AUGMENTATIONS[kind], [(5, 6)], copies)
    assert len({image.tobytes() for image in images}) > 1


def test_horizontal_flip_mirrors_the_image():
    ((images, _),) = augment_batch({"flip": "horizontal"}, [(7, 8)])
    flipped = [np.array_equal(image, original[:, ::-1]) for image, original in zip(images, IMAGES, strict=True)]
    unchanged = [np.array_equal(image, original) for image, original in zip(images, IMAGES, strict=True)]
    assert all(a != b for a, b in zip(flipped, unchanged, strict=True))
    assert 2 < sum(flipped) < 14


def test_mix_up_mixes_labels_in_the_ratio_of_the_images():
    flat = np.zeros_like(IMAGES)
    flat[np.arange(16) % 4 == 1] = 200.0
    ((images, labels),) = augment_batch({"mixUp": 1.0}, [(3, 4)], flat)
    np.testing.assert_allclose(images.mean(axis=(1, 2, 3)), 200.0 * labels[:, 1], rtol=1e-4, atol=1e-2)
    assert len(np.unique(labels)) > 4


def test_cut_mix_weights_labels_by_area():
    flat = np.zeros_like(IMAGES)
    flat[np.arange(16) % 4 == 1] = 200.0
    ((images, labels),) = augment_batch({"cutMix": 2.0}, [(3, 4)], flat)
    np.testing.assert_allclose(images.mean(axis=(1, 2, 3)), 200.0 * labels[:, 1], atol=20.0)  # Keras rounds the patch
    assert len(np.unique(labels)) > 4


def test_augmentations_can_be_combined_and_are_optional():
    settings = {"flip": "both", "rotation": 0.1, "randAugment": {}, "mixUp": 0.2}
    first, again = augment_batch(settings, [(1, 2), (1, 2)])
    np.testing.assert_array_equal(first[0], again[0])
    assert build_augmentation(Augmentation()) is None


def augment_on_nodes(settings, seeds, nodes):
    """Augment each shard of the batch as on its node, and concatenate the results."""
    augment = build_augmentation(Augmentation.model_validate(settings))
    dataset = tf.data.Dataset.from_tensor_slices(np.array(seeds, np.int32))

    def augment_shard(rows):
        def augment_rows(seed):
            sources = augment.sources(rows, 16, (16, 16), seed)
            assert sources.shape[0] <= 2 * len(rows)
            return augment.rows(tf.gather(IMAGES, sources), tf.gather(LABELS, sources), rows, 16, seed)

        return [(image.numpy(), label.numpy()) for image, label in dataset.map(augment_rows)]

    shards = [augment_shard(Shard(index, nodes).rows(16)) for index in range(nodes)]
    return [tuple(np.concatenate(parts) for parts in zip(*step, strict=True)) for step in zip(*shards, strict=True)]


SEEDS = [(number, 2 * number + 1) for number in range(12)]
COMBINED = {
    "combined": {"flip": "both", "rotation": 0.1, "zoom": 0.2, "contrast": 0.3, "mixUp": 0.4},
    "combined with cutMix": {"translation": 0.2, "brightness": 0.3, "cutMix": 0.5},
}


@pytest.mark.parametrize("nodes", [2, 8])
@pytest.mark.parametrize("kind", sorted({**AUGMENTATIONS, **COMBINED}.keys() - {"randAugment"}))
def test_images_are_augmented_in_the_same_way_on_any_number_of_nodes(kind, nodes):
    settings = {**AUGMENTATIONS, **COMBINED}[kind]
    for actual, expected in zip(
        augment_on_nodes(settings, SEEDS[:3], nodes), augment_batch(settings, SEEDS[:3]), strict=True
    ):
        for part, whole in zip(actual, expected, strict=True):
            np.testing.assert_array_equal(part, whole)


def test_rand_augment_is_the_same_on_any_number_of_nodes_unless_it_equalizes():
    settings = AUGMENTATIONS["randAugment"]
    augment = build_augmentation(Augmentation.model_validate(settings))
    equalization = 10
    equalizes = []
    for seed, whole, parts in zip(
        SEEDS, augment_batch(settings, SEEDS), augment_on_nodes(settings, SEEDS, 2), strict=True
    ):
        (drawn,) = augment._draw_batch(16, (16, 16), tf.constant(seed))
        equalizes.append(equalization in drawn["layer_idxes"].numpy())
        assert np.array_equal(whole[0], parts[0]) != equalizes[-1]
    assert 0 < sum(equalizes) < len(SEEDS) / 2
