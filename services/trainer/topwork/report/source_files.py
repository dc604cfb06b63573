"""Checks that exported models predict unmodified source files like the evaluated model predicts the stored images."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from topwork.data.dataset_manifest import StoredDataset
from topwork.report.exported_model import PredictFiles

if TYPE_CHECKING:
    from topwork.data.images.decoding import Preprocessing

DIRECTORY = "source-files"


@dataclass(frozen=True)
class SourceFiles:
    """Source files, one of each kind, with the expected predictions.

    Attributes:
        kinds: Format and pixels of each file, such as `PNG RGBA, transparency`.
        contents: Content of each file.
        is_servable: Whether the signature `encoded` can decode each file.
        expected: float32 (files, classes), probabilities of the evaluated model for the stored images.
    """

    kinds: tuple[str, ...]
    contents: tuple[bytes, ...]
    is_servable: tuple[bool, ...]
    expected: NDArray[np.float32]


def write_source_files(
    folder: Path,
    dataset: StoredDataset,
    directory: Path,
    image_size: tuple[int, int],
    preprocessing: "Preprocessing",
    forward: Callable[[NDArray[np.float32]], NDArray[np.float32]],
) -> None:
    """Write the source files of a dataset and what the evaluated model predicts for them.

    Args:
        folder: Directory of the inputs of the export check.
        dataset: The stored dataset.
        directory: Its local copy.
        image_size: Height and width of the inputs of the model.
        preprocessing: How images are decoded and resized in training.
        forward: The evaluated model.
    """
    from topwork.data.images.image_validation import validate_image

    originals = dataset.metadata.originals
    if not originals:
        return
    (folder / DIRECTORY).mkdir(parents=True)
    images = []
    for number, original in enumerate(originals):
        shutil.copyfile(directory / original.file, folder / DIRECTORY / str(number))
        stored = validate_image((directory / original.file).read_bytes()).encoded
        images.append(preprocessing.load(stored, image_size).numpy())
    np.save(folder / DIRECTORY / "expected.npy", forward(np.stack(images)))
    kinds = [(original.kind, original.is_servable) for original in originals]
    (folder / DIRECTORY / "kinds.json").write_text(json.dumps(kinds))


def read_source_files(folder: Path) -> SourceFiles | None:
    """Read the files written by `write_source_files`; None if there are none."""
    directory = folder / DIRECTORY
    if not directory.is_dir():
        return None
    kinds = json.loads((directory / "kinds.json").read_text())
    return SourceFiles(
        kinds=tuple(kind for kind, _ in kinds),
        contents=tuple((directory / str(number)).read_bytes() for number in range(len(kinds))),
        is_servable=tuple(is_servable for _, is_servable in kinds),
        expected=np.load(directory / "expected.npy"),
    )


def predict_source_files(
    version: Path, files: SourceFiles, predict_files: PredictFiles | None
) -> dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Predict source files as a model server and `topwork predict` do.

    Args:
        version: Directory of the exported files.
        files: The files.
        predict_files: Signature `encoded` of the SavedModel; None if it was not exported.

    Returns:
        Predicted and expected probabilities, float32 (files, classes), by what predicted them.

    Raises:
        RuntimeError: If the signature `encoded` rejects a file that it should decode.
    """
    from topwork.report.predictor import Predictor, validate_file

    stored = [validate_file(content) for content in files.contents]
    predictions = {"topwork predict": (Predictor(version).probabilities(stored), files.expected)}
    if predict_files:
        for number, (kind, is_servable) in enumerate(zip(files.kinds, files.is_servable, strict=True)):
            if is_servable:
                actual = _predict_served(predict_files, files.contents[number], kind)
                predictions[f"encoded ({kind})"] = (actual, files.expected[number : number + 1])
    return predictions


def _predict_served(predict_files: PredictFiles, content: bytes, kind: str) -> NDArray[np.float32]:
    import tensorflow as tf

    try:
        return predict_files([content])
    except tf.errors.OpError as error:
        raise RuntimeError(
            f"The signature encoded of the exported model does not decode a source file of the kind {kind}: "
            f"{error.message[:500]}"
        ) from error
