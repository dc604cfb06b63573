"""Checks that exported models predict like the evaluated model: each format is loaded by a new process.

That process is `python -m topwork.report.export_check`, which reads a JSON list from standard input: the directory of
the files, the directory of the inputs, and the formats.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from topwork.keras_import import import_keras
from topwork.report.evaluation import MetricsSection
from topwork.report.exported_model import load_format
from topwork.report.rounding import logit_differences, probability_tolerance
from topwork.report.source_files import predict_source_files, read_source_files

# A wrong export differs for most images, so that more of them would only take more time.
MAX_IMAGES = 128
MAX_BYTES = 512 * 2**20
MAX_ENCODED = 64
COMMAND: tuple[str, ...] = (sys.executable, "-m", "topwork.report.export_check")


class ExportCheck(MetricsSection):
    """Differences between the exported formats and the evaluated model.

    Attributes:
        tolerance: Largest difference of a probability that `logit_tolerance` allows.
        logit_tolerance: Largest accepted difference of a logit; see `topwork.report.rounding`.
        images: Test images predicted by every format.
        encoded_images: Images that were also sent to the signature `encoded` as files.
        largest_difference: Largest difference of a probability, by format, for `encoded`, and for unmodified source
            files that are sent to `encoded` and to `topwork predict`; see `topwork.report.source_files`.
        largest_logit_difference: Largest difference of a logit that the probabilities imply; decides the check.
        accuracy: Share of correctly classified images, by format and for `encoded`.
    """

    tolerance: float
    logit_tolerance: float
    images: int
    encoded_images: int
    largest_difference: dict[str, float]
    largest_logit_difference: dict[str, float]
    accuracy: dict[str, float]


def spread_indices(size: int, limit: int) -> NDArray[np.int64]:
    """Choose at most `limit` of `size` indices, evenly spaced and in ascending order.

    Returns:
        int64 (min(size, limit),).
    """
    return np.unique(np.linspace(0, size - 1, min(size, limit)).round().astype(np.int64))


def write_check_inputs(
    folder: Path,
    images: NDArray[np.uint8],
    probabilities: NDArray[np.float32],
    labels: NDArray[np.int64],
    encoded: Sequence[tuple[int, bytes]],
    logit_tolerance: float,
) -> None:
    """Write the inputs of the check and the expected probabilities.

    Args:
        folder: Directory to create.
        images: uint8 (n, height, width, 3).
        probabilities: float32 (n, classes), of the evaluated model.
        labels: int64 (n,).
        encoded: Some of the images as files, each with its index in `images`.
        logit_tolerance: Result of `estimate_logit_tolerance` for the evaluated model.
    """
    folder.mkdir(parents=True)
    np.save(folder / "images.npy", images)
    np.save(folder / "probabilities.npy", probabilities)
    np.save(folder / "labels.npy", labels)
    np.save(folder / "logit_tolerance.npy", logit_tolerance)
    np.save(folder / "encoded.npy", np.array([index for index, _ in encoded], np.int64))
    for index, data in encoded:
        (folder / f"{index}.image").write_bytes(data)


class CheckProcess:
    """A new process that checks an export. It imports TensorFlow at once, while this process still evaluates.

    The process ends with the `with` block, and also if this process is killed, which closes its standard input.

    Example:
        >>> with CheckProcess() as process:
        ...     check = process.check(folder, inputs, ("keras", "savedModel"))
    """

    def __enter__(self) -> Self:
        """Start the process."""
        self._errors = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
            text=True,
        )
        return self

    def __exit__(self, *_exception: object) -> None:
        """End the process, whether or not it has checked an export."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def check(self, folder: Path, inputs: Path, formats: Iterable[str]) -> ExportCheck:
        """Load each exported format in the process and compare its predictions. Call it once.

        Args:
            folder: Directory of the exported files.
            inputs: Directory written by `write_check_inputs`.
            formats: The exported formats.

        Returns:
            The differences, all within the tolerance.

        Raises:
            RuntimeError: If a format cannot be loaded, or its predictions differ.
        """
        result_file = inputs / "result.json"
        result_file.unlink(missing_ok=True)
        self._process.communicate(json.dumps([str(folder), str(inputs), *formats]))
        if self._process.returncode or not result_file.exists():
            self._errors.seek(0)
            errors = self._errors.read().decode("utf-8", "replace")
            raise RuntimeError(f"The exported model cannot be loaded by a new process:\n{errors[-4000:]}")
        result = ExportCheck.model_validate_json(result_file.read_text())
        _require_equal(result)
        return result


def _require_equal(result: ExportCheck) -> None:
    wrong = [
        f"{name} by {result.largest_difference[name]:.2g} (logits by {difference:.2g})"
        for name, difference in result.largest_logit_difference.items()
        if not difference <= result.logit_tolerance
    ]
    if wrong:
        raise RuntimeError(
            f"The exported model does not predict like the evaluated model: probabilities differ for "
            f"{', '.join(wrong)}; rounding explains at most {result.logit_tolerance:.2g} for a logit of this model. "
            "Nothing is published."
        )


def compare_predictions(folder: Path, inputs: Path, formats: Sequence[str]) -> ExportCheck:
    """Load each format in this process and compare its predictions.

    Args:
        folder: Directory of the exported files.
        inputs: Directory written by `write_check_inputs`.
        formats: The exported formats.

    Returns:
        The differences, whether or not they are within the tolerance.
    """
    images = np.load(inputs / "images.npy", mmap_mode="r")
    expected, labels = np.load(inputs / "probabilities.npy"), np.load(inputs / "labels.npy")
    encoded_indices = np.load(inputs / "encoded.npy")
    predictions, predict_files = {}, None
    for name in formats:
        model = load_format(folder, name)
        predictions[name] = (model.predict(images), expected, labels)
        predict_files = model.predict_files or predict_files
    if predict_files and len(encoded_indices):
        files = [(inputs / f"{index}.image").read_bytes() for index in encoded_indices]
        predictions["encoded"] = (predict_files(files), expected[encoded_indices], labels[encoded_indices])
    differences = {name: (actual, reference) for name, (actual, reference, _) in predictions.items()}
    if source_files := read_source_files(inputs):
        differences |= predict_source_files(folder, source_files, predict_files)
    logit_tolerance = float(np.load(inputs / "logit_tolerance.npy"))
    return ExportCheck(
        tolerance=probability_tolerance(logit_tolerance),
        logit_tolerance=logit_tolerance,
        images=len(images),
        encoded_images=len(encoded_indices) if "encoded" in predictions else 0,
        largest_difference={
            name: float(np.abs(actual - reference).max()) for name, (actual, reference) in differences.items()
        },
        largest_logit_difference={
            name: float(logit_differences(actual, reference).max()) for name, (actual, reference) in differences.items()
        },
        accuracy={
            name: float(np.mean(actual.argmax(axis=1) == true)) for name, (actual, _, true) in predictions.items()
        },
    )


def main() -> None:
    """Compare on the CPU: the parent process uses the GPUs.

    Imports everything first, then waits for directories and formats on standard input. If the parent process ends
    without sending them, so does this one.
    """
    import_keras()
    import tensorflow as tf

    import topwork.report.predictor  # noqa: F401

    tf.config.set_visible_devices([], "GPU")
    if not (request := sys.stdin.read()):
        return
    folder, inputs, *formats = json.loads(request)
    result = compare_predictions(Path(folder), Path(inputs), formats)
    (Path(inputs) / "result.json").write_text(json.dumps(result.model_dump(by_alias=True)))


if __name__ == "__main__":
    main()
