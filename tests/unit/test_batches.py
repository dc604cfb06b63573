"""Batches: order, resuming, and labels that match their images."""

from itertools import chain

import numpy as np
import pytest
import tensorflow as tf

from topwork.data.batches import Shard, evaluation_batches, merge_shards, training_batches, view_batches
from topwork.data.local_dataset import Split
from topwork.errors import DataError

CLASSES = 3


class _InMemory(Split):
    """A split in which the pixels of image i have the value i and its label is i modulo the number of classes."""

    def __init__(self, size):
        self.size = size
        self.image_size = (4, 6)
        self.labels = np.arange(size, dtype=np.int64) % CLASSES
        self._pixels = np.repeat(np.arange(size, dtype=np.uint8), 4 * 6 * 3).reshape(size, 4, 6, 3)
        self._rows = np.arange(size)


def _indices(batch):
    images, one_hot, weights = (part.numpy() for part in batch)
    indices = images[:, 0, 0, 0].astype(int)
    assert images.shape == (len(indices), 4, 6, 3)
    assert images.dtype == one_hot.dtype == weights.dtype == np.float32
    assert (images == indices[:, None, None, None]).all()
    return indices.tolist()


def _steps(split, count, **options):
    options = {"classes": CLASSES, "batch_size": 4, "seed": 7, **options}
    return [_indices(batch) for batch in training_batches(split, **options).take(count)]


def test_training_batches_shuffle_each_epoch_and_drop_the_remainder():
    steps = _steps(_InMemory(14), 9)
    epochs = [[*chain(*steps[start : start + 3])] for start in (0, 3, 6)]

    assert [len(set(epoch)) for epoch in epochs] == [12, 12, 12]
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_training_batches_depend_on_the_seed():
    split = _InMemory(14)
    assert _steps(split, 5) == _steps(split, 5)
    assert _steps(split, 5) != _steps(split, 5, seed=8)


@pytest.mark.parametrize("first_step", [1, 3, 5])
def test_training_batches_resume_at_any_step(first_step):
    split = _InMemory(14)
    assert _steps(split, 9 - first_step, first_step=first_step) == _steps(split, 9)[first_step:]


def test_training_batches_match_labels_and_weights_to_images():
    weights = np.array([1.0, 2.0, 4.0], np.float32)
    for images, one_hot, weight in training_batches(
        _InMemory(14), classes=CLASSES, batch_size=4, seed=7, class_weights=weights
    ).take(4):
        labels = images.numpy()[:, 0, 0, 0].astype(int) % CLASSES
        assert one_hot.numpy().tolist() == np.eye(CLASSES)[labels].tolist()
        assert weight.numpy().tolist() == weights[labels].tolist()


def test_training_batches_pass_the_same_augmentation_seed_to_a_step_after_resuming():
    def augment(images, one_hot, seed):
        return images + tf.random.stateless_uniform([], seed), one_hot

    def noise(first_step, count):
        batches = training_batches(
            _InMemory(14), classes=CLASSES, batch_size=4, seed=7, first_step=first_step, augment=augment
        )
        return [float(images.numpy()[0, 0, 0, 0]) % 1 for images, _, _ in batches.take(count)]

    uninterrupted = noise(0, 6)
    assert len(set(uninterrupted)) == 6
    assert noise(2, 4) == uninterrupted[2:]


def test_training_batches_reject_a_split_smaller_than_a_batch():
    with pytest.raises(DataError, match=r"contains 3 images, fewer than one batch of 4\. Set batchSize to at most 3"):
        training_batches(_InMemory(3), classes=CLASSES, batch_size=4, seed=7)


@pytest.mark.parametrize("size", [1, 7, 8, 9])
def test_evaluation_batches_contain_each_image_once_in_order(size):
    seen, total = [], 0.0
    for images, one_hot, weights in evaluation_batches(_InMemory(size), classes=CLASSES, batch_size=4):
        assert images.shape == (4, 4, 6, 3)
        real = weights.numpy() == 1
        seen += images.numpy()[real, 0, 0, 0].astype(int).tolist()
        assert one_hot.numpy()[real].argmax(axis=1).tolist() == [index % CLASSES for index in seen[-int(real.sum()) :]]
        assert not images.numpy()[~real].any()
        assert not one_hot.numpy()[~real].any()
        total += float(weights.numpy().sum())
    assert seen == list(range(size))
    assert total == size


@pytest.mark.parametrize("nodes", [2, 4])
def test_training_batches_of_all_nodes_are_those_of_a_single_node(nodes):
    split, options = _InMemory(27), {"classes": CLASSES, "batch_size": 8, "seed": 7, "first_step": 2}
    weights = np.array([1.0, 2.0, 4.0], np.float32)
    whole = list(training_batches(split, **options, class_weights=weights).take(5))
    shards = [
        list(training_batches(split, **options, class_weights=weights, shard=Shard(index, nodes)).take(5))
        for index in range(nodes)
    ]
    for step, batch in enumerate(whole):
        for part, expected in enumerate(batch):
            parts = [shard[step][part] for shard in shards]
            assert {len(part) for part in parts} == {8 // nodes}
            np.testing.assert_array_equal(np.concatenate(parts), expected)


def test_node_reads_only_its_own_rows():
    split, read = _InMemory(16), []

    def gather(indices):
        return tf.numpy_function(lambda rows: read.append(rows) or split.load_images(rows), [indices], tf.uint8)

    split.gather = lambda indices: tf.ensure_shape(tf.cast(gather(indices), tf.float32), (*indices.shape, 4, 6, 3))
    batches = training_batches(split, classes=CLASSES, batch_size=8, seed=7, shard=Shard(1, 4)).take(2)
    steps = [_indices(batch) for batch in batches]
    # Prefetching reads further batches.
    assert {len(rows) for rows in read} == {2}
    assert {tuple(step) for step in steps} <= {tuple(rows.tolist()) for rows in read}


@pytest.mark.parametrize("size", [1, 7, 16, 17])
@pytest.mark.parametrize("nodes", [2, 4])
def test_evaluation_batches_of_all_nodes_contain_each_image_once(size, nodes):
    split, options = _InMemory(size), {"classes": CLASSES, "batch_size": 8}
    whole = list(evaluation_batches(split, **options))
    shards = [list(evaluation_batches(split, **options, shard=Shard(index, nodes))) for index in range(nodes)]
    assert {len(shard) for shard in shards} == {len(whole)}
    for part in range(3):
        rows = np.concatenate([batch[part] for shard in shards for batch in shard])
        expected = np.concatenate([batch[part] for batch in whole])
        np.testing.assert_array_equal(merge_shards(rows, 8, nodes), expected)


def test_shards_reject_uneven_batches_and_wrong_indices():
    with pytest.raises(ValueError, match="A batch of 6 does not divide evenly among 4 nodes"):
        Shard(0, 4).rows(6)
    with pytest.raises(ValueError, match="not 2 of 2"):
        Shard(2, 2)
    with pytest.raises(ValueError, match="12 rows are not whole batches of 8 rows from 2 nodes"):
        merge_shards(np.zeros(12), 8, 2)


def _views(**options):
    def augment(images, one_hot, seed):
        return images + tf.random.stateless_uniform((len(images), 1, 1, 1), seed), one_hot

    batches = view_batches(_InMemory(9), classes=CLASSES, batch_size=4, views=2, augment=augment, seed=7, **options)
    return [images.numpy() for images in batches]


def test_view_batches_contain_each_image_in_each_view():
    batches = _views()
    assert [len(images) for images in batches] == [4] * 6
    seen = [images[:, 0, 0, 0].astype(int).tolist() for images in batches]
    assert seen == 2 * [[0, 1, 2, 3], [4, 5, 6, 7], [8, 0, 0, 0]]
    assert (batches[0] != batches[3]).all()


def test_view_batches_can_be_selected_and_divided():
    whole = _views()
    for actual, expected in zip(_views(numbers=np.array([1, 5])), (whole[1], whole[5]), strict=True):
        np.testing.assert_array_equal(actual, expected)
    parts = _views(numbers=np.array([5, 0]), parts=2)
    assert [len(part) for part in parts] == [2] * 4
    np.testing.assert_array_equal(np.concatenate(parts), np.concatenate([whole[5], whole[0]]))
    assert _views(numbers=np.array([], np.int64)) == []
