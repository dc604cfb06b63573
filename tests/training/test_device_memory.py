"""Exhausted memory of a device: exit code 2 with a batch size that is likely to fit. TensorFlow's own errors."""

import numpy as np
import pytest
import tensorflow as tf

from topwork.errors import SpecError
from topwork.model.device_memory import predict_in_parts, report_exhausted_memory, suggest_batch_size
from topwork.stages.pull import pull
from topwork.stages.transfer import transfer

# More than any address space, so that the allocation fails on every machine.
IMPOSSIBLE = 10**14


def test_exhausted_memory_is_an_error_that_suggests_a_batch_size():
    with pytest.raises(SpecError) as error, report_exhausted_memory("spec.transfer.batchSize", 48, 4):
        tf.zeros([IMPOSSIBLE])
    assert error.value.exit_code == 2
    assert str(error.value) == (
        "The memory of the CPU is exhausted (363.8 TiB could not be allocated): a step with spec.transfer.batchSize "
        "48, 12 on each of 4 replicas does not fit. Set spec.transfer.batchSize to 24 or less, reduce "
        "spec.dataset.imageSize, choose a smaller base, or raise spec.compute.memory."
    )
    too_small = pytest.raises(SpecError, match=r"batchSize 1 does not fit\. Reduce spec\.dataset\.imageSize")
    with too_small, report_exhausted_memory("spec.fineTune.batchSize", 1, 1):
        tf.zeros([IMPOSSIBLE])


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            tf.errors.ResourceExhaustedError(None, None, "Out of memory while trying to allocate 8589934592 bytes."),
            r"exhausted \(8\.0 GiB could not be allocated\)",
        ),
        (tf.errors.InternalError(None, None, "Failed: CUDA_ERROR_OUT_OF_MEMORY: out of memory"), "exhausted: a step"),
        (tf.errors.UnknownError(None, None, "CUDNN_STATUS_ALLOC_FAILED in conv"), "exhausted: a step"),
    ],
    ids=["xla", "cuda", "cudnn"],
)
def test_messages_of_xla_and_cuda_are_recognized(error, message):
    with pytest.raises(SpecError, match=message), report_exhausted_memory("spec.transfer.batchSize", 8, 1):
        raise error


@pytest.mark.parametrize(
    "error",
    [
        tf.errors.ResourceExhaustedError(None, None, "/scratch/model; No space left on device"),
        tf.errors.InternalError(None, None, "cuDNN launch failure"),
        ValueError("out of memory"),
    ],
    ids=["disk", "internal", "other"],
)
def test_other_errors_pass_through(error):
    with pytest.raises(type(error)) as raised, report_exhausted_memory("spec.transfer.batchSize", 8, 1):
        raise error
    assert raised.value is error


def test_suggestion_is_a_multiple_of_the_replicas_and_at_most_half():
    assert [suggest_batch_size(size, 1) for size in (64, 3, 2, 1)] == [32, 1, 1, None]
    assert [suggest_batch_size(size, 4) for size in (64, 12, 8, 4)] == [32, 4, 4, None]
    # Three quarters of the needed memory are available, but half of the batch is the limit.
    assert suggest_batch_size(64, 1, requested=1 << 30, available=3 << 30) == 32
    # A single tensor is larger than the memory: at most a fifth of the batch fits.
    assert suggest_batch_size(100, 2, requested=4 << 30, available=1 << 30) == 20


def test_batch_that_does_not_fit_is_predicted_in_parts():
    sizes = []

    def forward(images):
        sizes.append(len(images))
        return tf.zeros([IMPOSSIBLE]) if len(images) > 3 else images * 2

    images = np.arange(10)
    np.testing.assert_array_equal(predict_in_parts(forward)(images), images * 2)
    assert sizes == [10, 5, 2, 3, 5, 2, 3]
    with pytest.raises(tf.errors.ResourceExhaustedError):
        predict_in_parts(lambda _: tf.zeros([IMPOSSIBLE]))(images)


def test_training_step_that_does_not_fit_ends_with_the_suggestion(make_job, workspace, monkeypatch):
    def allocate(labels, logits):
        images = tf.cast(tf.shape(labels)[0], tf.int64)
        # TensorFlow would not allocate a sum of zeros.
        return tf.reduce_sum(tf.random.uniform([IMPOSSIBLE // 8 * images])) + logits[:, 0]

    monkeypatch.setattr("topwork.training.trainer.make_loss", lambda *_: allocate)
    job = make_job()
    with pytest.raises(
        SpecError, match=r"spec\.transfer\.batchSize 8 does not fit\. Set spec\.transfer\.batchSize to 4 or"
    ):
        transfer(job, pull(job, workspace), workspace)
