"""Feature extractor: runs the frozen part of a classifier as fast as the device and the precision allow."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import structlog
import tensorflow as tf
from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

from topwork.model.classifier import with_precision
from topwork.model.partition import count_multiplications
from topwork.nodes.group import NodeGroup
from topwork.training.distribution.strategy import cpu_supports_bfloat16

log = structlog.get_logger(__name__)

# Total multiplications above which converting variables to constants pays off: the conversion takes about ten seconds,
# and two cores compute about as many multiplications in that time.
MIN_MULTIPLICATIONS_TO_FREEZE = 1e12
# A serialized graph is limited to 2 GiB.
MAX_CONSTANT_BYTES = 1.5 * 2**30
# Maximum root mean square of the difference, relative to the features. bfloat16 has 8 bits; the layers lose one or two.
BFLOAT16_TOLERANCE = 0.02

Features = npt.NDArray[np.float32]
# Maps a batch that is distributed over the replicas of this node to its features.
Step = Callable[[Any], Features]


class FeatureExtractor:
    """Runs the frozen part of a classifier on all replicas of this node.

    The first call chooses the implementation, on which all nodes agree: it is a collective operation. Later calls run
    on this node alone.
    """

    def __init__(
        self, frozen_part: keras.Model, *, precision: str, images: int, nodes: NodeGroup | None = None
    ) -> None:
        """Prepare the extractor. Its implementation depends on job, model and machines, but not on measured times.

        Args:
            frozen_part: Frozen part of the classifier, built in the scope of the strategy.
            precision: `spec.compute.precision`.
            images: Number of images that all nodes run it on, counting every view.
            nodes: The nodes that compute features; None for a single one.
        """
        self._frozen_part, self._is_auto = frozen_part, precision == "auto"
        self._strategy = frozen_part.distribute_strategy
        self._nodes = nodes or NodeGroup()
        on_cpu = self._nodes.all(not tf.config.list_physical_devices("GPU"))
        weight_bytes = 4 * sum(prod(variable.shape) for variable in frozen_part.variables)
        multiplications = count_multiplications(frozen_part) * images
        self._freezes_graph = (
            on_cpu and weight_bytes < MAX_CONSTANT_BYTES and multiplications >= MIN_MULTIPLICATIONS_TO_FREEZE
        )
        self._step: Step | None = None

    def __call__(self, images: Any) -> Features:
        """Compute the features of a batch.

        Args:
            images: float32 (batch, height, width, 3) in 0..255, distributed over the replicas of this node.

        Returns:
            float32 (batch, *features).
        """
        if self._step is None:
            self._step = self._choose_step(images)
        return self._step(images)

    def _choose_step(self, sample: Any) -> Step:
        default = self._on_replicas(_inference(self._frozen_part))
        if not self._is_auto:
            return self._on_replicas(_freeze_graph(self._frozen_part)) if self._freezes_graph else default
        with self._strategy.scope():
            float32_model = with_precision(self._frozen_part, "float32")
        exact = self._on_replicas(_inference(float32_model))
        if self._freezes_graph:
            frozen_graph = self._on_replicas(_freeze_graph(float32_model))
            if not self._nodes.all(cpu_supports_bfloat16()):
                return frozen_graph
            return self._if_accurate(_with_onednn_bfloat16(frozen_graph), exact, sample)
        return default if float32_model is self._frozen_part else self._if_accurate(default, exact, sample)

    def _if_accurate(self, fast: Step, exact: Step, sample: Any) -> Step:
        """Choose the fast step if its features of a sample are within the tolerance of the exact ones, on all nodes."""
        difference = _relative_difference(fast(sample), exact(sample))
        is_accurate = self._nodes.all(difference <= BFLOAT16_TOLERANCE)
        log.info(
            "precision of the frozen layers",
            computed_in="bfloat16" if is_accurate else "float32",
            difference=difference,
        )
        return fast if is_accurate else exact

    def _on_replicas(self, function: Callable[[tf.Tensor], tf.Tensor]) -> Step:
        replicated = tf.function(
            lambda images: self._strategy.run(lambda part: tf.cast(function(part), tf.float32), (images,))
        )

        def step(images: Any) -> Features:
            parts = self._strategy.experimental_local_results(replicated(images))
            return np.concatenate([part.numpy() for part in parts])

        return step


def _inference(model: keras.Model) -> Callable[[tf.Tensor], tf.Tensor]:
    return lambda images: model(images, training=False)


def _freeze_graph(model: keras.Model) -> Callable[[tf.Tensor], tf.Tensor]:
    """Convert the variables to constants, which oneDNN can reorder and fold into each other."""
    images = tf.TensorSpec((None, *model.input_shape[1:]), tf.float32)
    traced = tf.function(_inference(model)).get_concrete_function(images)
    frozen = convert_variables_to_constants_v2(traced)
    return lambda batch: frozen(batch)[0]


def _with_onednn_bfloat16(step: Step) -> Step:
    """Compute convolutions and matrix products in bfloat16: TensorFlow rewrites the graph when the step runs."""

    def call(images: Any) -> Features:
        with _onednn_bfloat16():
            return step(images)

    return call


@contextmanager
def _onednn_bfloat16() -> Iterator[None]:
    option = "auto_mixed_precision_onednn_bfloat16"
    tf.config.optimizer.set_experimental_options({option: True})
    try:
        yield
    finally:
        tf.config.optimizer.set_experimental_options({option: False})


def _relative_difference(features: Features, reference: Features) -> float:
    """Return the RMS of the difference, relative to the reference; infinite if a value is not finite."""
    difference = float(np.sqrt(np.square(features - reference, dtype=np.float64).mean()))
    scale = float(np.sqrt(np.square(reference, dtype=np.float64).mean()))
    relative = difference / max(scale, 1e-30)
    return relative if np.isfinite(relative) else float("inf")
