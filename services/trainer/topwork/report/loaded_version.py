"""Loads a published version from storage, to evaluate it on the images of another job or version."""

import json
import unicodedata
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray
from ruamel.yaml import YAML

from topwork.artifacts import download_artifact, read_manifest
from topwork.clients.s3.storage import Storage
from topwork.data.images.decoding import Preprocessing
from topwork.model.export import EXPORTED_FILES
from topwork.registry import evaluated_images, versions
from topwork.registry.versions import Version
from topwork.report.evaluation import Evaluation
from topwork.report.exported_model import load_format, read_preprocessing
from topwork.report.held_out_split import Forward, HeldOutSplit, graph_of
from topwork.report.predictions import Predictions

MAX_NAMED_CLASSES = 5
MAX_REASON = 200


class NotComparableError(Exception):
    """The model cannot be evaluated on these images; the message is a clause with the reason."""


@dataclass(frozen=True)
class LoadedClassifier:
    """A classifier that can be evaluated on the images of another job.

    Attributes:
        class_names: Name of each class, in the order of its outputs.
        image_size: Height and width of its inputs.
        preprocessing: How its images are decoded and resized.
        forward: The model.
    """

    class_names: tuple[str, ...]
    image_size: tuple[int, int]
    preprocessing: Preprocessing
    forward: Forward

    def evaluate_on(
        self, held_out: HeldOutSplit, *, auc: bool, keep: NDArray[np.int64] | None = None, title: str
    ) -> tuple[Evaluation, Predictions]:
        """Evaluate the classifier, with images of its own size and the classes in the order of the split.

        Args:
            held_out: The images.
            auc: As in `HeldOutSplit.evaluate`.
            keep: As in `HeldOutSplit.evaluate`.
            title: As in `HeldOutSplit.evaluate`.

        Returns:
            The metrics, and the results of each image.

        Raises:
            NotComparableError: If it has other classes.
            DataError: If a probability is not finite.
        """
        order = match_classes(self.class_names, held_out.class_names)
        ours, its = held_out.images.image_size, self.image_size
        # Larger images must not need more memory than those of the job.
        batch_size = max(1, held_out.batch_size * ours[0] * ours[1] // max(ours[0] * ours[1], its[0] * its[1]))
        resized = replace(held_out, images=held_out.images.resized(its, self.preprocessing), batch_size=batch_size)

        def forward(images: Any) -> NDArray[np.float32]:
            return self.forward(images)[:, order]

        return resized.evaluate(forward, auc=auc, keep=keep, title=title)


def load_version(storage: Storage, version: Version, folder: Path) -> LoadedClassifier:
    """Load a published version from the first of its formats that topwork can load.

    Args:
        storage: Storage of the models.
        version: The version.
        folder: Local directory for its files.

    Returns:
        The version.

    Raises:
        NotComparableError: If it cannot be loaded.
        DamagedError: If a file does not match its manifest.
        UnavailableError: If storage cannot be reached.
    """
    prefix = versions.version_prefix(version.name, version.version)
    manifest = read_manifest(storage, prefix)
    files = manifest.files if manifest else {}
    name = next((name for name, file in EXPORTED_FILES.items() if file in files), None)
    if name is None:
        raise NotComparableError("its files contain no model in a known format")
    unused = {*EXPORTED_FILES.values(), "report.html", evaluated_images.FILE} - {EXPORTED_FILES[name]}
    download_artifact(storage, prefix, folder, select=lambda file: file not in unused)
    try:
        class_names = tuple(json.loads((folder / "metrics.json").read_bytes())["evaluation"]["classNames"])
        preprocessing = read_preprocessing(folder)
        if name == "keras":
            model = keras.models.load_model(folder / EXPORTED_FILES[name], compile=False)
            return LoadedClassifier(class_names, model.input_shape[1:3], preprocessing, graph_of(model))
        loaded = load_format(folder, name)
        size = loaded.image_size or _read_image_size(folder / "spec.yaml")
        return LoadedClassifier(class_names, size, preprocessing, lambda images: loaded.predict(images.numpy()))
    except Exception as error:
        raise NotComparableError(
            f"{EXPORTED_FILES[name]} cannot be loaded ({type(error).__name__}: {one_line(error)})"
        ) from error


def match_classes(its: tuple[str, ...], ours: tuple[str, ...]) -> list[int]:
    """Return the position of each of our classes in the outputs of another classifier.

    Args:
        its: Class names of the other classifier, in the order of its outputs.
        ours: Our class names.

    Returns:
        One position per class of ours.

    Raises:
        NotComparableError: If the classes are not the same; the message names those that differ.
    """
    positions = {unicodedata.normalize("NFC", name): index for index, name in enumerate(its)}
    names = [unicodedata.normalize("NFC", name) for name in ours]
    if len(positions) == len(its) and positions.keys() == set(names):
        return [positions[name] for name in names]
    only_its = [name for name in positions if name not in set(names)]
    only_ours = [name for name in names if name not in positions]
    raise NotComparableError(
        f"it has other classes (only there: {_name_some(only_its)}; only in this dataset: {_name_some(only_ours)})"
    )


def one_line(error: Exception) -> str:
    """Shorten the message of an error to one line of at most `MAX_REASON` characters."""
    text = " ".join(str(error).split())
    return text if len(text) <= MAX_REASON else f"{text[:MAX_REASON]}…"


def _read_image_size(file: Path) -> tuple[int, int]:
    """Read the input size of a SavedModel, which itself accepts images of any size."""
    spec: Any = YAML(typ="safe").load(file.read_text("utf-8"))
    height, width = spec["spec"]["dataset"]["imageSize"]
    return height, width


def _name_some(names: list[str]) -> str:
    more = f" and {len(names) - MAX_NAMED_CLASSES} more" if len(names) > MAX_NAMED_CLASSES else ""
    return (", ".join(names[:MAX_NAMED_CLASSES]) + more) or "none"
