"""Evaluates the latest published version on the images of this job, for gates that compare with it."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import structlog
from numpy.typing import NDArray

from topwork.artifacts import read_manifest
from topwork.clients.s3.storage import Storage
from topwork.errors import DamagedError, DataError
from topwork.registry import versions
from topwork.registry.cross_validation import SPLIT
from topwork.registry.versions import Version
from topwork.report.gates import LatestVersion
from topwork.report.held_out_split import MAX_KEPT_BYTES, HeldOutSplit
from topwork.report.loaded_version import NotComparableError, load_version, one_line
from topwork.report.predictions import Predictions
from topwork.report.statistics.bootstrap import ScoredImages
from topwork.report.statistics.paired import run_worse_tests
from topwork.spec import TransferJob

log = structlog.get_logger(__name__)

# Temperatures of the same weights that differ less, for example because of another device, are the same.
SAME_TEMPERATURE = 0.001


def evaluate_latest(
    job: TransferJob,
    weights: str,
    held_out: HeldOutSplit,
    predictions: Predictions,
    folder: Path,
    *,
    temperature: float | None = None,
) -> LatestVersion | None:
    """Evaluate the latest published version on the images on which the new model is evaluated.

    Its published metrics were measured on other images, unless dataset, splits and seed are the same: a comparison with
    them would say more about the images than about the models.

    Args:
        job: The job.
        weights: Hexadecimal SHA-256 of the trained model file of this job.
        held_out: The images.
        predictions: What the new model predicted for them, with the probabilities that `images_to_keep` selects.
        folder: Local directory for the files of the version; deleted at the end.
        temperature: The temperature of the new model; None if it is not calibrated.

    Returns:
        Its metrics and tests of the gates, or why it cannot be compared; None if no gate compares with it, or no
        version is published.

    Raises:
        UnavailableError: If storage cannot be reached.
    """
    gates = job.spec.evaluate.gates
    if not any(gate.compares_with_latest for gate in gates):
        return None
    storage = held_out.workspace.storage
    latest = _find_latest(storage, job.model_name)
    if latest is None:
        return None
    name = f"{latest.name}/{latest.version}"
    # Equal weights with another temperature have other probabilities.
    if latest.weights == weights and math.isclose(
        temperature or 1.0, _read_temperature(storage, latest), rel_tol=SAME_TEMPERATURE
    ):
        return LatestVersion(version=name, same_weights=True)
    if latest.split == SPLIT:
        return LatestVersion(version=name, reason="it is the final model of cross-validation, trained on all images")
    try:
        loaded = load_version(storage, latest, folder)
        evaluation, its_predictions = loaded.evaluate_on(
            held_out,
            auc="auc" in job.spec.evaluate.metrics,
            keep=images_to_keep(job, held_out),
            title="publish: latest version",
        )
    except (NotComparableError, DataError, DamagedError) as error:
        log.warning("the latest version cannot be evaluated", version=name, reason=str(error))
        return LatestVersion(version=name, reason=one_line(error))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    log.info("latest version on the same images", version=name, **evaluation.metrics)
    tested = [gate.metric for gate in gates if gate.not_worse_than_latest and gate.metric in evaluation.metrics]
    ours, its = (
        ScoredImages(held_out.images.labels, part, len(held_out.class_names)) for part in (predictions, its_predictions)
    )
    return LatestVersion(version=name, metrics=evaluation.metrics, tests=run_worse_tests(tested, ours, its))


def images_to_keep(job: TransferJob, held_out: HeldOutSplit) -> NDArray[np.int64] | None:
    """Return the images whose probabilities a gate that compares with the latest version needs: all, or None.

    Only a test of the AUC needs them, and only if they fit into memory.
    """
    if not any(gate.metric == "auc" and gate.not_worse_than_latest for gate in job.spec.evaluate.gates):
        return None
    images = held_out.images.size
    return np.arange(images) if images * len(held_out.class_names) * 4 <= MAX_KEPT_BYTES else None


def _find_latest(storage: Storage, name: str) -> Version | None:
    """Find the version that `latest.json` points to, or the newest remaining one if that version was deleted."""
    latest = versions.read_latest(storage, name)
    if latest is None or versions.read_version(storage, name, latest.version):
        return latest
    remaining = [number for number, is_published in versions.list_versions(storage, name).items() if is_published]
    return versions.read_version(storage, name, remaining[-1]) if remaining else None


def _read_temperature(storage: Storage, version: Version) -> float:
    """Read the temperature of a version: 1 if it is not calibrated, or its files are missing."""
    prefix = versions.version_prefix(version.name, version.version)
    manifest = read_manifest(storage, prefix)
    metrics = json.loads((manifest and storage.read(manifest.key_of(prefix, "metrics.json"))) or b"{}")
    return float((metrics.get("calibration") or {}).get("temperature") or 1.0)
