"""Predicts class probabilities of image files with a published model or a model file."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from topwork.data.images.decoding import is_decodable
from topwork.data.images.image_validation import validate_image
from topwork.errors import DataError, SettingError
from topwork.model.export import EXPORTED_FILES
from topwork.report.exported_model import LoadedModel, load_format, load_keras, read_preprocessing


class Predictor:
    """A loaded model with its class names.

    Attributes:
        class_names: Name of each class, or its index if there is no `labels.txt` next to the model.
        preprocessing: How image files are decoded and resized, as in training.

    Example:
        >>> predictor = Predictor(Path("models/cats-vs-dogs/1"))
        >>> predictor.probabilities([validate_file(Path("photo.jpg").read_bytes())])
        array([[0.03, 0.97]], dtype=float32)
    """

    def __init__(self, path: Path) -> None:
        """Load a model.

        Args:
            path: A `.keras` file, or the directory of a version.

        Raises:
            SettingError: If there is no model.
            DataError: If the file is not a Keras model from RGB images to one probability per class.
        """
        self._loaded = _load(path)
        folder = path if path.is_dir() else path.parent
        self.preprocessing = read_preprocessing(folder)
        labels = folder / "labels.txt"
        height, width = self._loaded.image_size or (64, 64)
        classes = self._loaded.predict(np.zeros((1, height, width, 3), np.uint8)).shape[-1]
        names = labels.read_text("utf-8").split("\n")[:-1] if labels.is_file() else []
        self.class_names = tuple(names) if len(names) == classes else tuple(str(index) for index in range(classes))

    def probabilities(self, files: Sequence[bytes]) -> NDArray[np.float32]:
        """Predict image files, decoded and resized as in training.

        Args:
            files: Image files returned by `validate_file`.

        Returns:
            float32 (files, classes).
        """
        if self._loaded.image_size is None:  # the model resizes, so images may differ in size
            images = (self.preprocessing.decode(file).numpy() for file in files)
            return np.concatenate([self._loaded.predict(image[np.newaxis]) for image in images])
        loaded = [self.preprocessing.load(file, self._loaded.image_size) for file in files]
        return self._loaded.predict(tf.stack(loaded).numpy())


def validate_file(data: bytes) -> bytes:
    """Validate an image file and convert it to the stored format, as pull does.

    Args:
        data: Any image file.

    Returns:
        An upright JPEG or PNG file.

    Raises:
        Rejection: If it cannot be decoded, with the reason.
    """
    encoded = validate_image(data).encoded
    if encoded == data and not is_decodable(data):
        return validate_image(data, keep_encoding=False).encoded
    return encoded


def _load(path: Path) -> LoadedModel:
    if path.is_file():
        return _load_keras_file(path)
    if not path.is_dir():
        raise SettingError(
            f"{path} does not exist. Expected an s3:// URI, a .keras file or the directory of a version."
        )
    for name, file in EXPORTED_FILES.items():
        if (path / file).is_file():
            return _load_keras_file(path / file) if name == "keras" else load_format(path, name)
    raise SettingError(f"{path} contains no model. Expected one of {', '.join(EXPORTED_FILES.values())}.")


def _load_keras_file(path: Path) -> LoadedModel:
    try:
        return load_keras(path)
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(f"{path} cannot be loaded as a Keras model for RGB images: {reason[0]}") from error
