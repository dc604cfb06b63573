"""Probable label errors: confident learning (Northcutt et al. 2021) on predictions of a linear classifier."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

FOLDS = 5
MAX_FEATURES = 128
"""Principal components of the features that the classifier uses."""

MIN_CLASS_IMAGES = 5
"""Images of smaller classes are not judged."""

_THRESHOLD_SHARE = 0.8
_PENALTY = 0.1  # C of scikit-learn: strong regularization, because some labels are wrong

Labels = npt.NDArray[np.int64]


@dataclass(frozen=True)
class LabelErrors:
    """Images whose class is probably wrong, most certain first.

    Attributes:
        index: Positions, int64 (n,).
        suggested: The class that the other images suggest, int64 (n,).
        probability: Predicted probability of their own class, (n,).
    """

    index: Labels
    suggested: Labels
    probability: npt.NDArray[np.float64]


def find_label_errors(features: npt.NDArray[np.float32], labels: Labels, classes: int, seed: int) -> LabelErrors:
    """Find images whose class is probably wrong.

    A linear classifier predicts each image after training on the other folds. The threshold of a class is 80 % of the
    mean probability of the class over its images: lower than in the paper, which finds fewer of the wrong classes. An
    image is suspect if another class exceeds its threshold, is the most probable one of those that do, and is more
    probable than its own class.

    Args:
        features: (n, dimensions).
        labels: int64 (n,), values 0..classes-1.
        classes: Number of classes.
        seed: Seed of the folds.

    Returns:
        The suspect images.
    """
    sizes = np.bincount(labels, minlength=classes)
    is_judged = sizes[labels] >= MIN_CLASS_IMAGES
    rows = np.flatnonzero(is_judged)
    if len(np.unique(labels[rows])) < 2:
        return LabelErrors(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))
    probabilities = predict_out_of_fold(features[rows], labels[rows], classes, seed)
    own = probabilities[np.arange(len(rows)), labels[rows]]
    totals = np.bincount(labels[rows], weights=own, minlength=classes)
    counts = np.bincount(labels[rows], minlength=classes)
    thresholds = np.where(counts > 0, _THRESHOLD_SHARE * totals / np.maximum(counts, 1), np.inf)
    confident = np.where(probabilities >= thresholds, probabilities, -1.0)
    suggested = confident.argmax(1)
    best = confident[np.arange(len(rows)), suggested]
    suspect = np.flatnonzero((suggested != labels[rows]) & (best > own))
    suspect = suspect[np.argsort(own[suspect] - best[suspect], kind="stable")]
    return LabelErrors(rows[suspect], suggested[suspect], own[suspect])


def predict_out_of_fold(
    features: npt.NDArray[np.float32], labels: Labels, classes: int, seed: int
) -> npt.NDArray[np.float64]:
    """Predict each image with a classifier that was trained on the other folds.

    Args:
        features: (n, dimensions).
        labels: int64 (n,).
        classes: Number of classes.
        seed: Seed of the folds.

    Returns:
        Probabilities, (n, classes).
    """
    scaled = StandardScaler().fit_transform(features)
    components = min(MAX_FEATURES, *scaled.shape)
    scaled = PCA(components, svd_solver="randomized", random_state=seed).fit_transform(scaled)
    scaled /= max(float(scaled.std()), 1e-9)
    folds = _stratified_folds(labels, seed)
    probabilities = np.zeros((len(labels), classes))
    for fold in range(FOLDS):
        held_out = folds == fold
        if not held_out.any():
            continue
        model = LogisticRegression(C=_PENALTY, max_iter=300, tol=1e-3).fit(scaled[~held_out], labels[~held_out])
        probabilities[np.ix_(held_out, model.classes_)] = model.predict_proba(scaled[held_out])
    return probabilities


def _stratified_folds(labels: Labels, seed: int) -> Labels:
    """Assign a fold to each image, so that every class is divided evenly."""
    order = np.random.default_rng(seed).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    folds = np.empty(len(labels), np.int64)
    folds[order] = np.arange(len(labels)) % FOLDS
    return folds
