"""Evaluates the latest published version on the images of this job, for gates that compare with it."""

import json
import shutil
import unicodedata
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import keras
import numpy as np
import structlog
from numpy.typing import NDArray
from ruamel.yaml import YAML

from topwork.artifacts import download_artifact, read_manifest
from topwork.clients.s3.storage import Storage
from topwork.data.images.decoding import Preprocessing
from topwork.errors import DamagedError, DataError
from topwork.model.export import EXPORTED_FILES
from topwork.registry import evaluated_images, versions
from topwork.registry.cross_validation import SPLIT
from topwork.registry.versions import Version
from topwork.report.exported_model import load_format, read_preprocessing
from topwork.report.gates import LatestVersion
from topwork.report.held_out_split import Forward, HeldOutSplit, graph_of
from topwork.spec import TransferJob

log = structlog.get_logger(__name__)

MAX_NAMED_CLASSES = 5
MAX_REASON = 200


class NotComparableError(Exception):
    """The version cannot be evaluated on these images; the message is a clause with the reason."""


@dataclass(frozen=True)
class LoadedVersion:
    """A published version, loaded from one of its formats.

    Attributes:
        class_names: Name of each class, in the order of its outputs.
        image_size: Height and width of its inputs.
        preprocessing: How its images are decoded and resized.
        forward: The model.
    """

    class_names: list[str]
    image_size: tuple[int, int]
    preprocessing: Preprocessing
    forward: Forward


def evaluate_latest(job: TransferJob, weights: str, held_out: HeldOutSplit, folder: Path) -> LatestVersion | None:
    """Evaluate the latest published version on the images on which the new model is evaluated.

    Its published metrics were measured on other images, unless dataset, splits and seed are the same: a comparison with
    them would say more about the images than about the models.

    Args:
        job: The job.
        weights: Hexadecimal SHA-256 of the trained model file of this job.
        held_out: The images.
        folder: Local directory for the files of the version; deleted at the end.

    Returns:
        Its metrics, or why it cannot be compared; None if no gate compares with it, or no version is published.

    Raises:
        UnavailableError: If storage cannot be reached.
    """
    if all(gate.at_least_latest_minus is None for gate in job.spec.evaluate.gates):
        return None
    storage = held_out.workspace.storage
    latest = _find_latest(storage, job.model_name)
    if latest is None:
        return None
    name = f"{latest.name}/{latest.version}"
    if latest.weights == weights:
        return LatestVersion(version=name, same_weights=True)
    if latest.split == SPLIT:
        return LatestVersion(version=name, reason="it is the final model of cross-validation, trained on all images")
    try:
        loaded = _load(storage, latest, folder)
        metrics = _evaluate(loaded, held_out, "auc" in job.spec.evaluate.metrics)
    except (NotComparableError, DataError, DamagedError) as error:
        log.warning("the latest version cannot be evaluated", version=name, reason=str(error))
        return LatestVersion(version=name, reason=_one_line(error))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    log.info("latest version on the same images", version=name, **metrics)
    return LatestVersion(version=name, metrics=metrics)


def _find_latest(storage: Storage, name: str) -> Version | None:
    """Find the version that `latest.json` points to, or the newest remaining one if that version was deleted."""
    latest = versions.read_latest(storage, name)
    if latest is None or versions.read_version(storage, name, latest.version):
        return latest
    remaining = [number for number, is_published in versions.list_versions(storage, name).items() if is_published]
    return versions.read_version(storage, name, remaining[-1]) if remaining else None


def _load(storage: Storage, latest: Version, folder: Path) -> LoadedVersion:
    prefix = versions.version_prefix(latest.name, latest.version)
    manifest = read_manifest(storage, prefix)
    files = manifest.files if manifest else {}
    name = next((name for name, file in EXPORTED_FILES.items() if file in files), None)
    if name is None:
        raise NotComparableError("its files contain no model in a known format")
    unused = {*EXPORTED_FILES.values(), "report.html", evaluated_images.FILE} - {EXPORTED_FILES[name]}
    download_artifact(storage, prefix, folder, select=lambda file: file not in unused)
    try:
        class_names = json.loads((folder / "metrics.json").read_bytes())["evaluation"]["classNames"]
        preprocessing = read_preprocessing(folder)
        if name == "keras":
            model = keras.models.load_model(folder / EXPORTED_FILES[name], compile=False)
            return LoadedVersion(class_names, model.input_shape[1:3], preprocessing, graph_of(model))
        loaded = load_format(folder, name)
        size = loaded.image_size or _read_image_size(folder / "spec.yaml")
        return LoadedVersion(class_names, size, preprocessing, lambda images: loaded.predict(images.numpy()))
    except Exception as error:
        raise NotComparableError(
            f"{EXPORTED_FILES[name]} cannot be loaded ({type(error).__name__}: {_one_line(error)})"
        ) from error


def _read_image_size(file: Path) -> tuple[int, int]:
    """Read the input size of a SavedModel, which itself accepts images of any size."""
    spec: Any = YAML(typ="safe").load(file.read_text("utf-8"))
    height, width = spec["spec"]["dataset"]["imageSize"]
    return height, width


def _evaluate(loaded: LoadedVersion, held_out: HeldOutSplit, auc: bool) -> dict[str, float]:
    order = _match_classes(loaded.class_names, held_out.class_names)
    ours, its = held_out.images.image_size, loaded.image_size
    # Larger images must not need more memory than those of this job.
    batch_size = max(1, held_out.batch_size * ours[0] * ours[1] // max(ours[0] * ours[1], its[0] * its[1]))
    resized = replace(held_out, images=held_out.images.resized(its, loaded.preprocessing), batch_size=batch_size)

    def forward(images: Any) -> NDArray[np.float32]:
        return loaded.forward(images)[:, order]

    evaluation, _ = resized.evaluate(forward, auc=auc, title="latest version")
    return evaluation.metrics


def _match_classes(its: list[str], ours: tuple[str, ...]) -> list[int]:
    """Return the position of each of our classes in the outputs of the version."""
    positions = {unicodedata.normalize("NFC", name): index for index, name in enumerate(its)}
    names = [unicodedata.normalize("NFC", name) for name in ours]
    if len(positions) == len(its) and positions.keys() == set(names):
        return [positions[name] for name in names]
    only_its = [name for name in positions if name not in set(names)]
    only_ours = [name for name in names if name not in positions]
    raise NotComparableError(
        f"it has other classes (only there: {_name_some(only_its)}; only in this dataset: {_name_some(only_ours)})"
    )


def _name_some(names: list[str]) -> str:
    more = f" and {len(names) - MAX_NAMED_CLASSES} more" if len(names) > MAX_NAMED_CLASSES else ""
    return (", ".join(names[:MAX_NAMED_CLASSES]) + more) or "none"


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= MAX_REASON else f"{text[:MAX_REASON]}…"
