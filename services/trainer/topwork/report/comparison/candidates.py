"""The models of a comparison: published versions, and runs that have published nothing."""

import csv
import io
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from topwork.artifacts import read_manifest
from topwork.clients.s3.storage import Storage
from topwork.data.dataset_manifest import StoredDataset
from topwork.data.local_dataset import LocalDataset, fetch_dataset
from topwork.errors import DataError, SettingError
from topwork.registry import versions
from topwork.registry.cross_validation import SPLIT
from topwork.registry.datasets import read_stored_dataset
from topwork.registry.evaluated_images import identify_images, read_evaluated_images
from topwork.registry.split_inputs import read_split_inputs
from topwork.registry.stage_keys import StageKeys, stage_keys
from topwork.registry.stage_results import Classifier, HistoryRow, TrainingStage, read_reference, read_stage_result
from topwork.registry.versions import Version
from topwork.report.held_out_split import HeldOutSplit, graph_of
from topwork.report.loaded_version import LoadedClassifier, load_version
from topwork.report.trained_model import load_trained
from topwork.spec import TransferJob
from topwork.spec.digest import digest_of
from topwork.spec.loading.loader import read_bytes
from topwork.workspace import Workspace


@dataclass(frozen=True)
class Candidate:
    """A model to compare.

    Attributes:
        name: Its name in the comparison: `cats/3`, or the name of a run.
        uri: URI of the version or the run.
        job: The job that trained it.
        dataset: The dataset that it was trained on.
        history: One row per epoch of its training.
        storage: Its storage.
        model: The published version, or the classifier of a run that has published nothing.
    """

    name: str
    uri: str
    job: TransferJob
    dataset: StoredDataset
    history: Sequence[HistoryRow]
    storage: Storage
    model: Version | Classifier

    @property
    def is_trial(self) -> bool:
        """Whether its job never publishes, such as the trials of a search."""
        return not self.job.spec.publish.enabled

    @property
    def model_bytes(self) -> int | None:
        """Size of the Keras model file; None if a version has none."""
        if isinstance(self.model, Classifier):
            return self.model.file.size
        manifest = read_manifest(self.storage, versions.version_prefix(self.model.name, self.model.version))
        file = manifest.files.get("model.keras") if manifest else None
        return file.size if file else None


def read_version_candidate(storage: Storage, version: Version) -> Candidate:
    """Read what a published version was trained on.

    Args:
        storage: Storage of the models.
        version: The version.

    Returns:
        The candidate.

    Raises:
        DataError: If it cannot be compared, with the reason.
    """
    name = f"{version.name}/{version.version}"
    if version.split == SPLIT:
        raise _not_comparable(name, "it is the final model of cross-validation, trained on all images")
    if not version.dataset:
        raise _not_comparable(name, "it was published by an older topwork, which did not record its dataset")
    prefix = versions.version_prefix(version.name, version.version)
    manifest = read_manifest(storage, prefix)
    spec, rows = (
        (storage.read(manifest.key_of(prefix, file)) if manifest else None) for file in ("spec.yaml", "history.csv")
    )
    job = _read_job(spec, f"{version.uri}/spec.yaml", name).as_run(version.run)
    dataset = _read_dataset(job, version.dataset, storage, name)
    candidate = Candidate(name, version.uri, job, dataset, _read_history(rows or b""), storage, version)
    if dataset.inputs and dataset.inputs.lists and _keys(candidate).publish != version.key:
        raise _not_comparable(name, "the lists of its splits, or its base, have changed since")
    return candidate


def read_run_candidate(storage: Storage, run: str) -> Candidate:
    """Read what a run was trained on. If it has published a version, that version is compared.

    Args:
        storage: Storage of the run.
        run: Name of the run.

    Returns:
        The candidate.

    Raises:
        SettingError: If there is no such run.
        DataError: If it cannot be compared, with the reason.
    """
    spec = storage.read(f"runs/{run}/spec.yaml")
    if spec is None:
        raise SettingError(f"{storage.uri} has no run {run}. Use the name that topwork run or topwork list prints.")
    if (published := _read_fields(storage, f"runs/{run}/publish/done.json")) and (
        version := versions.read_version(storage, published["name"], published["version"])
    ):
        return read_version_candidate(storage, version)
    job = _read_job(spec, storage.uri_of(f"runs/{run}/spec.yaml"), run).as_run(run)
    if job.spec.dataset.folds:
        raise _not_comparable(run, "it cross-validates: it has one model per fold, each with other test images")
    stage: TrainingStage = "fine-tune" if job.spec.fine_tune else "transfer"
    reference = read_reference(storage, run, stage)
    classifier = read_stage_result(storage, stage, reference.key) if reference else None
    pulled = _read_fields(storage, f"runs/{run}/pull/done.json")
    if reference is None or classifier is None or not pulled:
        raise _not_comparable(run, "its training is not complete, or its results were deleted")
    dataset = _read_dataset(job, pulled["dataset"], storage, run)
    uri = storage.uri_of(f"runs/{run}")
    candidate = Candidate(run, uri, job, dataset, classifier.history, storage, classifier)
    if _keys(candidate).training != reference.key:
        raise _not_comparable(run, "its dataset, the lists of its splits, or its base have changed since")
    return candidate


def load_splits(candidate: Candidate, workspace: Workspace) -> LocalDataset:
    """Download the dataset of a candidate, and select the splits that it was trained and evaluated on.

    Args:
        candidate: The candidate.
        workspace: Progress, and scratch for the datasets of all candidates.

    Returns:
        The splits.

    Raises:
        DataError: If they are not those of the training.
    """
    scratch = workspace.scratch / digest_of(candidate.storage.uri)[:8]
    own = replace(workspace, storage=candidate.storage, scratch=scratch)
    local = fetch_dataset(candidate.dataset, candidate.job, own, decode=False)
    if isinstance(candidate.model, Version):
        _check_test_images(candidate.name, candidate.model, local, candidate.storage)
    return local


def _check_test_images(name: str, version: Version, local: LocalDataset, storage: Storage) -> None:
    """Check that the splits are those of the training, by the images that the version was evaluated on."""
    recorded = read_evaluated_images(storage, version.name, version.version)
    split = local.test if local.test is not None else local.validation
    selected = identify_images(split, local.class_names) if split is not None else ()
    if recorded is not None and Counter(recorded) != Counter(selected):
        raise _not_comparable(name, "this topwork selects other test images than those that it was evaluated on")


def load_classifier(candidate: Candidate, local: LocalDataset, workspace: Workspace) -> LoadedClassifier:
    """Download and load the model of a candidate.

    Args:
        candidate: The candidate.
        local: Its splits.
        workspace: Scratch for the files.

    Returns:
        The classifier.

    Raises:
        NotComparableError: If it cannot be loaded.
    """
    folder = workspace.scratch / "model"
    if isinstance(candidate.model, Version):
        return load_version(candidate.storage, candidate.model, folder)
    folder.mkdir(parents=True)
    names, job = candidate.model.class_names, candidate.job
    own, validation = replace(workspace, storage=candidate.storage), None
    # Like their own metrics, those of trials are not calibrated: they are compared on the images that would fit it.
    is_calibrated = job.spec.evaluate.calibration != "none" and not candidate.is_trial
    if is_calibrated and local.validation is not None:
        batch_size = job.spec.transfer.batch_size
        validation = HeldOutSplit("validation", local.validation, local.class_names, batch_size, own)
    trained = load_trained(candidate.model, own, folder, job=job if is_calibrated else None, validation=validation)
    forward = graph_of(trained.probabilities)
    return LoadedClassifier(names, candidate.model.image_size, local.train.preprocessing, forward)


def _not_comparable(name: str, reason: str) -> DataError:
    return DataError(f"{name} cannot be compared: {reason}.")


def _keys(candidate: Candidate) -> StageKeys:
    dataset = candidate.dataset
    return stage_keys(candidate.job, dataset.metadata.fingerprint, candidate.storage, dataset.inputs)


def _read_job(content: bytes | None, uri: str, name: str) -> TransferJob:
    if content is None:
        raise _not_comparable(name, "its files contain no spec.yaml")
    return read_bytes(content, uri)[0]


def _read_dataset(job: TransferJob, prefix: str, storage: Storage, name: str) -> StoredDataset:
    dataset = read_stored_dataset(storage, prefix)
    if dataset is None:
        raise _not_comparable(name, f"its dataset {storage.uri_of(prefix)} was deleted")
    return replace(dataset, inputs=read_split_inputs(job, storage))


def _read_fields(storage: Storage, key: str) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads(storage.read(key) or b"{}")
    return fields


def _read_history(content: bytes) -> list[HistoryRow]:
    rows = csv.DictReader(io.StringIO(content.decode()))
    return [
        {name: value if name == "stage" else float(value) for name, value in row.items() if value != ""} for row in rows
    ]
