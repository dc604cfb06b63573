"""A published model, or one in a file, that answers image files as they come."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from topwork.data.decoding import decode, resize
from topwork.data.image_validation import validate_image
from topwork.errors import DataError, SettingError
from topwork.model.export import EXPORTED_FILES
from topwork.report.exported_model import Loaded, load, load_keras


class Answering:
    """A model with its class names.

    Attributes:
        class_names: Name of each class; their numbers where no `labels.txt` lies beside the model.
    """

    def __init__(self, path: Path) -> None:
        """Load a model.

        Args:
            path: A `.keras` file, or the folder of a version.

        Raises:
            SettingError: If there is no model.
            DataError: If the file is not a Keras model that takes RGB images and gives one probability a class.
        """
        self._loaded = _load(path)
        labels = (path if path.is_dir() else path.parent) / "labels.txt"
        height, width = self._loaded.image_size or (64, 64)
        classes = self._loaded.predict(np.zeros((1, height, width, 3), np.uint8)).shape[-1]
        names = labels.read_text("utf-8").split("\n")[:-1] if labels.is_file() else []
        self.class_names = tuple(names) if len(names) == classes else tuple(str(index) for index in range(classes))

    def probabilities(self, files: Sequence[bytes]) -> NDArray[np.float32]:
        """Answer image files, each decoded as before training: upright, 8 bit, RGB.

        Args:
            files: Whole image files that `prove` has passed.

        Returns:
            float32 (files, classes).
        """
        images = [decode(file) for file in files]
        if self._loaded.image_size is None:  # it resizes by itself, so each may have another size
            return np.concatenate([self._loaded.predict(image.numpy()[np.newaxis]) for image in images])
        return self._loaded.predict(tf.stack([resize(image, self._loaded.image_size) for image in images]).numpy())


def usable(data: bytes) -> bytes:
    """Prove an image file and bring it into the stored form, as pull does.

    Args:
        data: Any image file.

    Returns:
        An upright 8-bit JPEG or PNG file.

    Raises:
        Rejection: If it does not decode; with the reason.
    """
    return validate_image(data).encoded


def _load(path: Path) -> Loaded:
    if path.is_file():
        return _checked(path)
    if not path.is_dir():
        raise SettingError(f"{path} does not exist. Name an s3:// address, a .keras file or the folder of a version.")
    for name, file in EXPORTED_FILES.items():
        if (path / file).is_file():
            return _checked(path / file) if name == "keras" else load(path, name)
    raise SettingError(f"{path} holds no model: expected one of {', '.join(EXPORTED_FILES.values())} in it.")


def _checked(path: Path) -> Loaded:
    try:
        return load_keras(path)
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(f"{path} can't be loaded as a Keras model for RGB images: {reason[0]}") from error
