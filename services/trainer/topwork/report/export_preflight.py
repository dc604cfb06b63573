"""Exports the untrained model in every requested format, so that an unsupported one fails before training."""

import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import keras
import numpy as np
import structlog

from topwork.data.images.decoding import Preprocessing
from topwork.model.export import add_probabilities, export_model, report_unsupported_format
from topwork.report.exported_model import load_format
from topwork.spec import TransferJob
from topwork.workspace import Workspace

log = structlog.get_logger(__name__)

# Formats of other libraries: a file that was written may still contain an operation that the library does not load.
CONVERTED_FORMATS = frozenset({"tflite", "onnx"})

# Model and formats that this process has checked: transfer and fine-tuning of a run have the same architecture.
_checked: set[tuple[str, str]] = set()


def check_exportable(
    job: TransferJob,
    build_model: Callable[[], keras.Model],
    class_names: Sequence[str],
    workspace: Workspace,
    *,
    architecture: str,
    attempt_prefix: str,
) -> None:
    """Export a model in each format and predict an image with it, then delete the files.

    Whether a format supports a model depends on its operations, not on its weights. A format is checked once per
    process. A stage that resumes checks only the formats of other libraries again, because they may have been added to
    the spec since; Keras' own formats support every model that could be trained so far.

    Args:
        job: The job, for `spec.publish.formats`; nothing is checked if it does not publish.
        build_model: Returns the classifier, trained or not; called only if there is a format to check.
        class_names: Name of each class.
        workspace: Storage and scratch. One format at a time needs as much scratch space as the published file.
        architecture: Identifies the model: models with the same value have the same operations.
        attempt_prefix: Storage key prefix of the checkpoints; the stage resumes if there is an object.

    Raises:
        SpecError: If the model cannot be exported in a format.
    """
    formats = job.spec.publish.formats if job.spec.publishes else ()
    pending = [name for name in formats if (architecture, name) not in _checked]
    if pending and any(True for _ in workspace.storage.list(f"{attempt_prefix}/")):
        pending = [name for name in pending if name in CONVERTED_FORMATS]
    if not pending:
        return
    log.info("check export formats", formats=" ".join(pending))
    model = add_probabilities(build_model(), len(class_names))
    with tempfile.TemporaryDirectory(dir=workspace.scratch, prefix="export-") as directory:
        for name in pending:
            folder = Path(directory) / name
            folder.mkdir()
            # Decoding does not depend on the model, and tracing it takes as long as a small model.
            export_model(model, class_names, (name,), Preprocessing(), folder, decodes_files=False)
            if name in CONVERTED_FORMATS:
                with report_unsupported_format(name):
                    _predict_one(folder, name, model.input_shape[1:3], len(class_names))
            shutil.rmtree(folder)
            _checked.add((architecture, name))


def _predict_one(folder: Path, name: str, image_size: tuple[int, int], classes: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, (1, *image_size, 3), dtype=np.uint8)
    shape = load_format(folder, name).predict(image).shape
    if shape != (1, classes):
        raise ValueError(f"the file predicts an array of shape {shape} instead of {(1, classes)}")
