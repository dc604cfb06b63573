"""Proof that what was exported answers as what was evaluated: each format, loaded by a fresh process.

`python -m topwork.report.export_check FOLDER QUESTIONS` is that process.
"""

import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from topwork.report.evaluation import Figures
from topwork.report.exported_model import encoded_probabilities, load

# Largest difference between two probabilities of one class of one image. Formats order float32 sums differently:
# a deep network moves by some 1e-6, a wrong weight or input scaling by far more than this.
TOLERANCE = 1e-4
# More images prove no more, and the formats that run on one core would take long over them.
MOST_IMAGES = 1000
MOST_BYTES = 512 * 2**20
MOST_ENCODED = 200


class Recheck(Figures):
    """How far the exported artefacts are from the evaluated model.

    Attributes:
        tolerance: Largest difference of a probability that is accepted.
        images: Test images that every format answered.
        encoded_images: Of them, those that were sent to the signature `encoded` as files.
        largest_difference: By format, and `encoded`.
        accuracy: By format, and `encoded`: share of the images that it classified rightly.
    """

    tolerance: float
    images: int
    encoded_images: int
    largest_difference: dict[str, float]
    accuracy: dict[str, float]


def spread(size: int, most: int) -> NDArray[np.int64]:
    """Pick at most `most` of `size` indices, evenly spread, each once and in order.

    Returns:
        int64 (min(size, most),).
    """
    return np.unique(np.linspace(0, size - 1, min(size, most)).round().astype(np.int64))


def write_questions(
    folder: Path,
    images: NDArray[np.uint8],
    probabilities: NDArray[np.float32],
    labels: NDArray[np.int64],
    encoded: Sequence[tuple[int, bytes]],
) -> None:
    """Write what the fresh process asks, and the answers that it must get.

    Args:
        folder: Where it goes; it is made.
        images: uint8 (n, height, width, 3).
        probabilities: float32 (n, classes), as evaluated.
        labels: int64 (n,).
        encoded: Some of the images as files, each with its place in `images`.
    """
    folder.mkdir(parents=True)
    np.save(folder / "images.npy", images)
    np.save(folder / "probabilities.npy", probabilities)
    np.save(folder / "labels.npy", labels)
    np.save(folder / "encoded.npy", np.array([place for place, _ in encoded], np.int64))
    for place, data in encoded:
        (folder / f"{place}.image").write_bytes(data)


def recheck(folder: Path, questions: Path, formats: Iterable[str]) -> Recheck:
    """Let a fresh process load each exported format and compare its answers.

    Args:
        folder: The exported files.
        questions: From `write_questions`.
        formats: The formats that were exported.

    Returns:
        What was found; all of it within the tolerance.

    Raises:
        RuntimeError: If a format does not load or gives other answers: the export is broken.
    """
    answers = questions / "answers.json"
    command = [sys.executable, "-m", "topwork.report.export_check", str(folder), str(questions), *formats]
    process = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if process.returncode or not answers.exists():
        raise RuntimeError(f"What was exported does not load in a fresh process:\n{process.stderr[-4000:]}")
    found = Recheck.model_validate_json(answers.read_text())
    wrong = [f"{name} by {by:.2g}" for name, by in found.largest_difference.items() if not by <= TOLERANCE]
    if wrong:
        raise RuntimeError(
            f"What was exported does not answer as what was evaluated: probabilities differ in {', '.join(wrong)}, "
            f"and {TOLERANCE:g} is accepted. Nothing is published."
        )
    return found


def compare(folder: Path, questions: Path, formats: Sequence[str]) -> Recheck:
    """Load each format and compare its answers, in this process.

    Args:
        folder: The exported files.
        questions: From `write_questions`.
        formats: The formats that were exported.

    Returns:
        What was found, whether or not it is within the tolerance.
    """
    images = np.load(questions / "images.npy", mmap_mode="r")
    wanted, labels = np.load(questions / "probabilities.npy"), np.load(questions / "labels.npy")
    places = np.load(questions / "encoded.npy")
    answers = {name: (load(folder, name).predict(images), wanted, labels) for name in formats}
    if "savedModel" in formats and len(places):
        files = [(questions / f"{place}.image").read_bytes() for place in places]
        answers["encoded"] = (encoded_probabilities(folder, files), wanted[places], labels[places])
    return Recheck(
        tolerance=TOLERANCE,
        images=len(images),
        encoded_images=len(places) if "encoded" in answers else 0,
        largest_difference={name: float(np.abs(got - want).max()) for name, (got, want, _) in answers.items()},
        accuracy={name: float(np.mean(got.argmax(axis=1) == true)) for name, (got, _, true) in answers.items()},
    )


def main() -> None:
    """Compare on the processor: the process that waits for this one holds the GPUs."""
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")
    folder, questions, formats = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    found = compare(folder, questions, formats)
    (questions / "answers.json").write_text(json.dumps(found.model_dump(by_alias=True)))


if __name__ == "__main__":
    main()
