"""The most confident mistakes of a classifier, with what it looked at."""

from dataclasses import dataclass

import keras
import numpy as np
import structlog
from numpy.typing import NDArray

from topwork.errors import quote_error
from topwork.model.gradcam import compute_heat_maps, find_feature_maps
from topwork.report.held_out_split import MAX_BATCH_SIZE, HeldOutSplit, full_float32_precision
from topwork.report.pictures import overlay_heat, thumbnail
from topwork.report.predictions import Predictions
from topwork.report.results import Misclassification

log = structlog.get_logger(__name__)

MAX_MISTAKES = 24
NO_FEATURE_MAPS = (
    "There are no heat maps (Grad-CAM): the model has no feature maps with several rows and columns, and with the "
    "channels last, that all paths from the image to the logits go through."
)


@dataclass(frozen=True)
class Explanation:
    """What the classifier looked at in some images.

    Attributes:
        note: What the heat maps show, or why there are none.
        heat_maps: float32 (images, rows, columns) in 0..1; None if there are none.
    """

    note: str
    heat_maps: NDArray[np.float32] | None = None


def worst_mistakes(
    model: keras.Model, held_out: HeldOutSplit, predictions: Predictions
) -> tuple[tuple[Misclassification, ...], str]:
    """Describe the misclassified images of which the classifier was most confident, with heat maps of Grad-CAM.

    Args:
        model: The classifier, from images float32 (batch, height, width, 3) in 0..255 to logits.
        held_out: The images on which it was evaluated.
        predictions: What it predicted for them.

    Returns:
        The mistakes, most confident first, and a note on the heat maps; empty without mistakes.
    """
    split, class_names = held_out.images, held_out.class_names
    predicted, confidence = predictions.predicted, predictions.confidence
    wrong = np.flatnonzero(predicted != split.labels)
    worst = wrong[np.argsort(-confidence[wrong], kind="stable")][:MAX_MISTAKES]
    if not len(worst):
        return (), ""
    images = split.load_images(worst)
    explanation = explain(model, images, predicted[worst], min(held_out.batch_size, MAX_BATCH_SIZE))
    heated = [""] * len(worst)
    if explanation.heat_maps is not None:
        pairs = zip(images, explanation.heat_maps, strict=True)
        heated = [thumbnail(overlay_heat(image, heat)) for image, heat in pairs]
    mistakes = tuple(
        Misclassification(
            name=split.names[index],
            true_class=class_names[split.labels[index]],
            predicted_class=class_names[predicted[index]],
            confidence=float(confidence[index]),
            thumbnail_uri=thumbnail(image),
            heat_uri=heat_uri,
        )
        for index, image, heat_uri in zip(worst, images, heated, strict=True)
    )
    return mistakes, explanation.note


def explain(model: keras.Model, images: NDArray[np.uint8], labels: NDArray[np.int64], batch_size: int) -> Explanation:
    """Compute heat maps of some images. A model for which that fails has none: the report must not fail a run.

    Args:
        model: The classifier, from images float32 (batch, height, width, 3) in 0..255 to logits.
        images: uint8 (n, height, width, 3).
        labels: int64 (n,), the class to explain of each image.
        batch_size: Number of images that are predicted at once.

    Returns:
        The heat maps and what they show, or the reason why there are none.
    """
    try:
        parts = find_feature_maps(model)
        if parts is None:
            return Explanation(NO_FEATURE_MAPS)
        with full_float32_precision():
            heat_maps = compute_heat_maps(parts, images, labels, batch_size)
    except Exception as error:
        log.warning("Grad-CAM failed", error=type(error).__name__, reason=quote_error(error))
        return Explanation(f"There are no heat maps (Grad-CAM): {type(error).__name__}: {quote_error(error)}")
    rows, columns = parts.size
    return Explanation(
        "Right: what the model looked at (Grad-CAM). Colors from blue to red show where the image raises the score of "
        f"the predicted class, judged by the last feature maps, of {rows}x{columns}. They show where, not why, and are "
        "relative to the hottest place of each image.",
        heat_maps,
    )
