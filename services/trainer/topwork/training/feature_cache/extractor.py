"""The frozen half of a classifier as a function of images, as fast as the machine can."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf
from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

from topwork.model.classifier import in_precision
from topwork.model.partition import multiplications
from topwork.progress import Progress
from topwork.training.strategy import processor_has_bfloat16

# Turning variables to constants and rewriting the graph takes some ten seconds: no gain on fewer multiplications than
# two cores do in about that time.
WORTH_COMPILING = 1e12
# A serialized graph holds 2 GiB at most.
MOST_CONSTANT_BYTES = 1.5 * 2**30
# Root mean square of the difference, relative to the features: bfloat16 keeps 8 bits, of which layers lose one or two.
BFLOAT16_TOLERANCE = 0.02

Features = npt.NDArray[np.float32]
# A batch as `experimental_distribute_dataset` gives it, to its features.
Step = Callable[[Any], Features]


class Extraction:
    """Runs the frozen half under the strategy, on all replicas."""

    def __init__(self, lower: keras.Model, *, precision: str, images: int, progress: Progress) -> None:
        """Look at what can be had; the choice depends on the job, the model and the machine, never on time measured.

        Args:
            lower: Frozen half, built in the scope of the strategy.
            precision: `spec.compute.precision`.
            images: Images that it will see, each view counted.
            progress: Where the choice is told.
        """
        self._lower, self._auto, self._progress = lower, precision == "auto", progress
        self._strategy = lower.distribute_strategy
        on_processor = not tf.config.list_physical_devices("GPU")
        small = 4 * sum(prod(variable.shape) for variable in lower.variables) < MOST_CONSTANT_BYTES
        self._compiles = on_processor and small and multiplications(lower) * images >= WORTH_COMPILING
        self._step: Step | None = None

    def __call__(self, images: Any) -> Features:
        """Compute the features of a batch.

        Args:
            images: float32 (batch, height, width, 3) in 0..255, as `experimental_distribute_dataset` gives them.

        Returns:
            float32 (batch, *features).
        """
        if self._step is None:
            self._step = self._choose(images)
        return self._step(images)

    def _choose(self, sample: Any) -> Step:
        plain = self._on_replicas(self._called(self._lower))
        if not self._auto:
            return self._on_replicas(self._constant(self._lower)) if self._compiles else plain
        with self._strategy.scope():
            lower = in_precision(self._lower, "float32")
        exact = self._on_replicas(self._called(lower))
        if self._compiles:
            constant = self._constant(lower)
            if not processor_has_bfloat16():
                return self._on_replicas(constant)
            return self._agreeing(_with_onednn_bfloat16(self._on_replicas(constant)), exact, sample)
        return plain if lower is self._lower else self._agreeing(plain, exact, sample)

    def _agreeing(self, fast: Step, exact: Step, sample: Any) -> Step:
        """Take the fast way where its features of a sample are those of the exact one, within its precision."""
        difference = _relative(fast(sample), exact(sample))
        agrees = difference <= BFLOAT16_TOLERANCE
        self._progress.note(
            "precision of the frozen layers", computed_in="bfloat16" if agrees else "float32", difference=difference
        )
        return fast if agrees else exact

    def _called(self, model: keras.Model) -> Callable[[tf.Tensor], tf.Tensor]:
        return lambda images: model(images, training=False)

    def _on_replicas(self, function: Callable[[tf.Tensor], tf.Tensor]) -> Step:
        replicated = tf.function(
            lambda images: self._strategy.run(lambda one: tf.cast(function(one), tf.float32), (images,))
        )

        def step(images: Any) -> Features:
            parts = self._strategy.experimental_local_results(replicated(images))
            return np.concatenate([part.numpy() for part in parts])

        return step

    def _constant(self, lower: keras.Model) -> Callable[[tf.Tensor], tf.Tensor]:
        """Turn the variables into constants, which oneDNN lays out once and folds into one another."""
        images = tf.TensorSpec((None, *lower.input_shape[1:]), tf.float32)
        traced = tf.function(self._called(lower)).get_concrete_function(images)
        constant = convert_variables_to_constants_v2(traced)
        return lambda one: constant(one)[0]


def _with_onednn_bfloat16(step: Step) -> Step:
    """Compute convolutions and matrix products in bfloat16: TensorFlow rewrites the graph where it is called so."""

    def call(images: Any) -> Features:
        with _onednn_bfloat16():
            return step(images)

    return call


@contextmanager
def _onednn_bfloat16() -> Iterator[None]:
    name = "auto_mixed_precision_onednn_bfloat16"
    tf.config.optimizer.set_experimental_options({name: True})
    try:
        yield
    finally:
        tf.config.optimizer.set_experimental_options({name: False})


def _relative(one: Features, other: Features) -> float:
    """Root mean square of the difference, relative to that of the other; infinite where a value is not finite."""
    difference = float(np.sqrt(np.square(one - other, dtype=np.float64).mean()))
    size = float(np.sqrt(np.square(other, dtype=np.float64).mean()))
    relative = difference / max(size, 1e-30)
    return relative if np.isfinite(relative) else float("inf")
