"""Loads a trained classifier for evaluation and export, and calibrates its probabilities if the job says so."""

from dataclasses import dataclass
from pathlib import Path

import keras

from topwork.errors import DataError
from topwork.model.classifier import with_precision
from topwork.model.export import add_probabilities
from topwork.registry.stage_results import Classifier
from topwork.report.calibration import Calibration, fit_calibration, require_same_classes
from topwork.report.held_out_split import HeldOutSplit, graph_of
from topwork.report.predictions import Predictions
from topwork.spec import TransferJob
from topwork.workspace import Workspace


@dataclass(frozen=True)
class TrainedModel:
    """A trained classifier in float32, whatever precision it was trained with.

    Attributes:
        logits: Images float32 (batch, height, width, 3) in 0..255 to logits: float32 (batch, 1) for two classes,
            otherwise (batch, classes).
        probabilities: The same images to calibrated probabilities float32 (batch, classes).
        calibration: The calibration; None if the job does not calibrate.
    """

    logits: keras.Model
    probabilities: keras.Model
    calibration: Calibration | None = None

    def compare_with_uncalibrated(self, calibrated: Predictions, held_out: HeldOutSplit) -> Calibration | None:
        """Evaluate the classifier also as it was before calibration.

        Args:
            calibrated: What the calibrated classifier predicted.
            held_out: The images for which it did.

        Returns:
            The calibration, with the metrics before it if the classifier is calibrated.
        """
        if self.calibration is None or self.calibration.temperature is None:
            return self.calibration
        forward = graph_of(add_probabilities(self.logits, len(held_out.class_names)))
        evaluation, predictions = held_out.evaluate(forward, auc=False, title="before calibration")
        require_same_classes(predictions, calibrated)
        return self.calibration.with_uncalibrated(evaluation)


def load_trained(
    classifier: Classifier,
    workspace: Workspace,
    folder: Path,
    *,
    job: TransferJob | None = None,
    validation: HeldOutSplit | None = None,
) -> TrainedModel:
    """Load a classifier, and calibrate it if the job does.

    Args:
        classifier: The classifier; its model is downloaded from storage.
        workspace: Storage.
        folder: Local directory for the file.
        job: The job; None loads the classifier without calibration.
        validation: The validation split, on which the temperature is fitted; None if there is none.

    Returns:
        The loaded classifier.

    Raises:
        DataError: If the job calibrates and there is no validation split.
    """
    workspace.storage.download(classifier.key, folder / "model.keras", classifier.file)
    logits = with_precision(keras.models.load_model(folder / "model.keras", compile=False), "float32")
    classes = len(classifier.class_names)
    if job is None or job.spec.evaluate.calibration == "none":
        return TrainedModel(logits, add_probabilities(logits, classes))
    if validation is None:
        raise DataError(
            "spec.evaluate.calibration needs a validation split, but the dataset has none. Set "
            "spec.dataset.splits.validation, or remove calibration."
        )
    batches = validation.predict(graph_of(logits), "calibration")
    calibration = fit_calibration(batches, validation.images.labels, classes)
    return TrainedModel(logits, add_probabilities(logits, classes, calibration.temperature), calibration)
