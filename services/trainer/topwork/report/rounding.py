"""Tells rounding differences between two float32 implementations of a model from real differences.

Each format and each device adds float32 numbers in another order, so that predictions differ slightly. How much depends
on the model: a difference of one rounding error grows or shrinks from layer to layer, and logits of 50 have larger
errors than logits of 1. A fixed limit for probabilities is therefore both too strict and too generous: deep networks
with correct exports exceed 1e-4, and with 20,000 classes every probability may be below it.

The method is backward error analysis (Higham, "Accuracy and Stability of Numerical Algorithms", 2002, chapter 3): a
stable implementation returns the exact result of a model with slightly different weights. `estimate_logit_tolerance`
changes all weights by random relative errors of the size of one float32 rounding error, and measures how much the
logits change. Errors of a correct export are a small multiple of this change, those of a wrong export a huge one.

Measured on CPU with 96x96 pixels, batch statistics of the images, and logits with a standard deviation of 8. The
columns are multiples of the estimated change, the first three for 2 and 40 classes, the others the lower of the two. A
reloaded `.keras` file differed by at most 7.9. Differences of a probability were up to 3.5e-4 with correct exports:

    base             savedModel   tflite      onnx        images + 1 of 255   wrong scaling, colors or classes
    two convolutions     0.0, 0.2    6.4, 2.5    9.6, 2.3             24,000                 at least 250,000
    MobileNetV2          0.0, 0.0    1.5, 0.9    1.5, 0.8             23,000                 at least  37,000
    ResNet50             0.0, 0.0    2.1, 2.3    2.6, 1.5             13,000                 at least  20,000
    EfficientNetB0       0.0, 1.7    0.1, 2.4          -               2,200                 at least  43,000
    VGG16                0.0, 0.9    9.8, 3.4    5.2, 1.4             23,000                 at least 350,000
    Xception             0.1, 0.4    2.1, 1.7    1.4, 1.2             39,000                 at least 240,000
    InceptionV3          0.1, 0.1    1.5, 1.6    1.8, 1.3             16,000                 at least  19,000
    ConvNeXtTiny         0.0, 0.7    1.2, 4.2          -              37,000                 at least 2,300,000

`ROUNDING_ERRORS` lies between them. GPUs were not measured: the limit leaves them errors about ten times larger than
those between CPU libraries, because Winograd convolutions are less accurate than sums. TF32 is disabled for the
evaluation. Half precision needs no other limit: `add_probabilities` converts every model to float32 before it is
evaluated and exported, whatever precision it was trained with.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import keras

EPSILON = float(np.finfo(np.float32).eps)
# Accepted multiple of the change that one rounding error of each weight causes.
ROUNDING_ERRORS = 100
# Bounds of the tolerance: the functions exp and log of the libraries differ by some rounding errors, even if the model
# has no weights; and a model in which rounding changes logits by more than 0.1 does not predict reproducibly.
MIN_LOGIT_TOLERANCE = ROUNDING_ERRORS * EPSILON
MAX_LOGIT_TOLERANCE = 0.1
# Size of the random errors, in rounding errors: large enough to be exact in float32, small enough to act linearly.
PERTURBATION = 64
SAMPLED_IMAGES = 16
REPETITIONS = 2
# Rounding errors of a probability itself.
PROBABILITY_ERRORS = 8
# Libraries may replace smaller numbers by zero.
SMALLEST_PROBABILITY = 1e-30


def estimate_logit_tolerance(model: "keras.Model", images: NDArray[np.uint8]) -> float:
    """Estimate how much the logits of a correct export may differ from those of the model.

    The weights of the model are changed for a moment.

    Args:
        model: Images float32 (batch, height, width, 3) in 0..255 to probabilities float32 (batch, classes).
        images: uint8 (n, height, width, 3), images of the dataset.

    Returns:
        Largest accepted difference of a logit.
    """
    sample = images[np.unique(np.linspace(0, len(images) - 1, SAMPLED_IMAGES).round().astype(int))]
    pixels = sample.astype(np.float32)
    exact = np.asarray(model(pixels, training=False))
    weights, random, change = model.get_weights(), np.random.default_rng(0), 0.0
    try:
        for _ in range(REPETITIONS):
            model.set_weights([_perturb(values, random) for values in weights])
            changed = np.asarray(model(pixels, training=False))
            change = max(change, float(logit_differences(changed, exact).max()) / PERTURBATION)
    finally:
        model.set_weights(weights)
    return float(np.clip(ROUNDING_ERRORS * change, MIN_LOGIT_TOLERANCE, MAX_LOGIT_TOLERANCE))


def logit_differences(actual: NDArray[np.float32], expected: NDArray[np.float32]) -> NDArray[np.float64]:
    """Compute how much logits must differ at least to explain a difference of probabilities.

    If no logit differs by more than d, the odds p / (1 - p) differ by a factor of at most exp(2 d), and p by at most
    p (1 - p) (exp(2 d) - 1). Unlike the difference of p, d does not depend on whether p is near 0, 0.5 or 1.

    Args:
        actual: float32 (images, classes), probabilities of an exported model.
        expected: float32 (images, classes), probabilities of the evaluated model.

    Returns:
        float64 (images, classes), without the rounding errors of the probabilities themselves.
    """
    p = expected.astype(np.float64)
    # With two classes, the first probability is 1 minus the second: its error does not shrink with it.
    size = np.ones_like(p) if p.shape[1] == 2 else p
    rounding = PROBABILITY_ERRORS * EPSILON * size + SMALLEST_PROBABILITY
    excess = np.maximum(np.abs(actual.astype(np.float64) - p) - rounding, 0.0)
    scale = np.maximum(p, SMALLEST_PROBABILITY) * np.maximum(1 - p, EPSILON / 2)
    differences: NDArray[np.float64] = 0.5 * np.log1p(excess / scale)
    return differences


def probability_tolerance(logit_tolerance: float) -> float:
    """Return the largest difference of a probability that the tolerance of the logits allows, which is at p = 0.5."""
    return 0.25 * float(np.expm1(2 * logit_tolerance)) + PROBABILITY_ERRORS * EPSILON


def _perturb(values: NDArray[Any], random: np.random.Generator) -> NDArray[Any]:
    if values.dtype.kind != "f":
        return values
    factors = 1 + PERTURBATION * EPSILON * random.standard_normal(values.shape, np.float32).astype(np.float64)
    perturbed: NDArray[Any] = (values * factors).astype(values.dtype)
    return perturbed
