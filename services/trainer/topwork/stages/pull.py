"""The pull stage: validates the images of a source and stores them as a dataset in object storage."""

import json
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import structlog
from pydantic import BaseModel, ConfigDict

from topwork.artifacts import read_json_record, write_artifact
from topwork.clients.s3.storage import Storage
from topwork.data.dataset_manifest import (
    DatasetMetadata,
    RejectedImage,
    StoredDataset,
    dataset_prefix,
    format_rejections,
    read_dataset_metadata,
)
from topwork.data.images.decode_pool import DecodePool
from topwork.data.images.image_validation import REASONS
from topwork.data.images.value_range import summarize_values
from topwork.data.sources import Source, open_dataset_source
from topwork.data.sources.class_selection import SelectedClasses
from topwork.data.sources.source import find_similar_class_names
from topwork.data.splits.counts import check_splits
from topwork.disk_space import directory_bytes, require_free_space
from topwork.errors import DataError
from topwork.registry.datasets import FORMAT, fingerprint_of, read_stored_dataset, select_dataset, write_entries
from topwork.registry.split_inputs import read_split_inputs
from topwork.spec import TransferJob
from topwork.spec.applications import NOT_DOWNLOADED
from topwork.workspace import Workspace

log = structlog.get_logger(__name__)

# MAX_MEM_BUFFER_SIZE of tensorflow_datasets.core.shuffle.
SHUFFLE_BUFFER_BYTES = 1000 << 20

WAIT_POLL_SECONDS = 5.0
"""Time between two looks of a waiting node into storage."""
WAIT_REPORT_SECONDS = 60.0
"""Time between two log lines of a waiting node, and after which it checks the source itself."""


class PullResult(BaseModel):
    """The result of a finished pull, stored as `done.json`.

    Attributes:
        format: Version of this record.
        dataset: Key prefix of the dataset.
        attempt: Identifies the Job that pulled it, whose pods keep the dataset even if the source changes. Empty
            outside a cluster.
        started: When the pull started. None if an older version of topwork wrote the record.
        finished: When the pull finished.
    """

    model_config = ConfigDict(frozen=True)

    format: int = 1
    dataset: str
    attempt: str = ""
    started: datetime | None = None
    finished: datetime | None = None


def pull(job: TransferJob, workspace: Workspace) -> StoredDataset:
    """Validate the images of a job and store them, unless they are already stored.

    Args:
        job: The job.
        workspace: Storage, metrics, progress and scratch.

    Returns:
        The stored dataset.

    Raises:
        DataError: If the source has no valid images, too many images are invalid, or the splits can't be filled.
        SettingError: If the images exceed the limit of the scratch volume.
        UnavailableError: If the source or storage can't be reached, or the scratch disk is full.

    Example:
        >>> dataset = pull(job, workspace)
        >>> dataset.prefix
        'datasets/photos/0f3a9c57d2e84b16'
    """
    with workspace.metrics.track_stage("pull"):
        workspace.metrics.init_rejection_reasons(REASONS)
        dataset = find_pulled_dataset(job, workspace) or _pull_for_training(job, workspace)
        workspace.metrics.set_dataset_images(dataset.metadata.images)
        _log_dataset(dataset.metadata)
        return dataset


def _pull_for_training(job: TransferJob, workspace: Workspace) -> StoredDataset:
    """Pull the images, unless the training after it would certainly fail for lack of weights or lists."""
    inputs = read_split_inputs(job, workspace.storage)
    base = job.spec.model.base
    if base.needs_imagenet and base.application in NOT_DOWNLOADED:
        from topwork.training.base_files import require_mirrored_weights

        require_mirrored_weights(base.application, workspace)
    return replace(_pull_source(job, workspace), inputs=inputs)


def find_pulled_dataset(job: TransferJob, workspace: Workspace) -> StoredDataset | None:
    """Find the dataset of a job in storage: the one selected for the run, or the one that its source gives now.

    Does not import the training libraries, and does not read images.

    Args:
        job: The job of the run.
        workspace: Storage and metrics.

    Returns:
        The dataset, or None if it has to be pulled.

    Raises:
        DataError: If the source or a list of the splits is invalid, or the dataset that the user pinned was deleted.
        UnavailableError: If the source or storage cannot be reached.
    """
    dataset = find_dataset(job, workspace)
    if dataset is None:
        return None
    log.info("stage already complete", stage="pull", dataset=workspace.storage.uri_of(dataset.prefix))
    inputs = read_split_inputs(job, workspace.storage)
    _check_dataset(dataset.metadata, job)
    result = _read_result(job, workspace.storage)
    if result is None or (result.dataset, result.attempt) != (dataset.prefix, workspace.attempt):
        result = PullResult(dataset=dataset.prefix, attempt=workspace.attempt)
        _write_result(job, result, workspace.storage)
    _restore_metrics(result, dataset.metadata, workspace)
    return replace(dataset, inputs=inputs)


def wait_for_dataset(job: TransferJob, workspace: Workspace) -> StoredDataset:
    """Wait until node 0 has pulled the dataset of this run. A stop request interrupts this.

    Args:
        job: The job of the run.
        workspace: Storage, metrics and progress.

    Returns:
        The stored dataset, without the lists of its splits.

    Raises:
        UnavailableError: If storage cannot be reached.
    """
    start = reported = time.monotonic()
    with workspace.metrics.track_stage("pull"), workspace.track("waiting for the dataset", None) as tracker:
        log.info("waiting until node 0 has pulled the dataset")
        while (dataset := _find_dataset_of_attempt(job, workspace)) is None:
            if time.monotonic() - reported >= WAIT_REPORT_SECONDS:
                reported = time.monotonic()
                log.info("waiting until node 0 has pulled the dataset", waited_seconds=round(reported - start))
                # The Job of `compute.prefetch` may have recorded itself after node 0 did.
                if _read_result(job, workspace.storage) and (dataset := find_dataset(job, workspace)):
                    break
            time.sleep(WAIT_POLL_SECONDS)
            tracker.advance()
        log.info("dataset is there", dataset=workspace.storage.uri_of(dataset.prefix))
        return dataset


def _find_dataset_of_attempt(job: TransferJob, workspace: Workspace) -> StoredDataset | None:
    """Find the dataset that node 0 pulled in this attempt; an earlier one may be of an older state of the source."""
    if workspace.dataset:
        return find_dataset(job, workspace)
    result = _read_result(job, workspace.storage)
    if result is None or result.attempt != workspace.attempt:
        return None
    return read_stored_dataset(workspace.storage, result.dataset)


def find_dataset(job: TransferJob, workspace: Workspace) -> StoredDataset | None:
    """Find the dataset of a job, like `find_pulled_dataset`, without changing anything."""
    if workspace.dataset:
        dataset = read_stored_dataset(workspace.storage, workspace.dataset)
        if dataset is None:
            raise DataError(
                f"The dataset {workspace.storage.uri_of(workspace.dataset)}, which was selected for this run, does not "
                "exist any more. Start the job again without --pinned."
            )
        return dataset
    result = _read_result(job, workspace.storage)
    earlier = read_stored_dataset(workspace.storage, result.dataset) if result else None
    # All pods of a Job train on the same dataset.
    if workspace.attempt and result and result.attempt == workspace.attempt:
        return earlier
    # The versions of TFDS datasets do not change.
    if job.spec.dataset.source.tfds:
        return earlier if earlier and earlier.metadata.pull_format == FORMAT else None
    selected = select_dataset(job, workspace)
    return selected.stored if selected else None


def _result_key(job: TransferJob) -> str:
    return f"runs/{job.run}/pull/done.json"


def _read_result(job: TransferJob, storage: Storage) -> PullResult | None:
    key = _result_key(job)
    data = storage.read(key)
    if data is None:
        return None
    return read_json_record(
        PullResult, data, storage.uri_of(key), "the result of a finished pull", "start over with --restart"
    )


def _write_result(job: TransferJob, result: PullResult, storage: Storage) -> None:
    """Write `done.json`, unless another process of the run has already finished a pull of the same dataset."""
    key, data = _result_key(job), result.model_dump_json().encode()
    if storage.write(key, data, only_if_absent=True, content_type="application/json"):
        return
    existing = _read_result(job, storage)
    if existing is None or (existing.dataset, existing.attempt) != (result.dataset, result.attempt):
        storage.write(key, data, content_type="application/json")


def _pull_source(job: TransferJob, workspace: Workspace) -> StoredDataset:
    """Find the dataset of the source in storage, or store it."""
    source = open_dataset_source(job.spec.dataset, workspace)
    fingerprint = fingerprint_of(source, job.spec.dataset)
    prefix = dataset_prefix(source.name, fingerprint)
    metadata = read_dataset_metadata(workspace.storage, prefix)
    if metadata:
        log.info("dataset already stored", uri=workspace.storage.uri_of(prefix), images=metadata.images)
        _count_rejected(metadata.rejected, workspace)
        _check_dataset(metadata, job)
    else:
        metadata = _store_dataset(source, fingerprint, prefix, job, workspace)
    started = workspace.metrics.stage_start_time("pull")
    result = PullResult(dataset=prefix, attempt=workspace.attempt, started=started, finished=datetime.now(UTC))
    _write_result(job, result, workspace.storage)
    return StoredDataset(prefix, metadata)


def _store_dataset(
    source: Source, fingerprint: str, prefix: str, job: TransferJob, workspace: Workspace
) -> DatasetMetadata:
    """Validate and write the dataset on scratch, then upload it."""
    directory = workspace.scratch / "pull" / fingerprint
    # Images of a killed pull are read again: they must not count as used space.
    shutil.rmtree(directory, ignore_errors=True)
    _check_free_space(source, workspace)
    classes = source.class_names()
    if job.spec.dataset.classes is not None:
        # The size of the selected images may be known only now.
        _check_free_space(source, workspace)
    if len(classes) < 2:
        raise DataError(
            f"{_format_source(source)} contains only one class, {', '.join(classes) or '(unnamed)'}, but a classifier "
            "needs at least two. Expected one directory per class. The address may be one level too high or too low."
        )
    directory.mkdir(parents=True)
    try:
        dataset, metadata = _write_dataset(source, fingerprint, directory, job, workspace)
        _check_dataset(metadata, job)
        if (entries := source.entries()) is not None:
            write_entries(entries, dataset)
        # A concurrent pull of the same source uploads identical files: they depend only on the source.
        manifest = write_artifact(workspace.storage, prefix, dataset, metadata.model_dump(mode="json"))
        stored = DatasetMetadata.model_validate(manifest.facts)
        _check_dataset(stored, job)
        return stored
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _check_free_space(source: Source, workspace: Workspace) -> None:
    """Check that the images fit on the scratch disk before downloading them, if the source knows their size."""
    if (estimate := source.estimate_space()) is None:
        return
    # TFDS shuffles a dataset on disk if it exceeds the memory buffer, which takes a second copy.
    copies = 2 if estimate.image_bytes > SHUFFLE_BUFFER_BYTES else 1
    needed = estimate.download_bytes + copies * estimate.image_bytes
    workspace.scratch.mkdir(parents=True, exist_ok=True)
    # The fingerprint may have needed the download already, or a killed pull left it.
    existing = min(estimate.download_bytes, directory_bytes(workspace.scratch / "pull"))
    require_free_space(
        workspace.scratch, needed, f"Pulling {_format_source(source)}", workspace.scratch_limit, existing=existing
    )


def _write_dataset(
    source: Source, fingerprint: str, directory: Path, job: TransferJob, workspace: Workspace
) -> tuple[Path, DatasetMetadata]:
    from topwork.data.contradictions import resolve_contradictions
    from topwork.data.images.decoding import is_decodable, prepare_decoding
    from topwork.data.tfds_writer import write_tfds

    counts = list(source.splits().values())
    total = None if None in counts else sum(count or 0 for count in counts)
    prepare_decoding()
    with workspace.track("pull: images", total) as tracker, DecodePool(is_decodable=is_decodable) as pool:
        dataset, stats = write_tfds(source, pool, directory, tracker.advance)
    _count_rejected(stats.rejected, workspace)
    metadata = DatasetMetadata(
        name=source.name,
        fingerprint=fingerprint,
        pull_format=FORMAT,
        source=source.description(),
        class_names=source.class_names(),
        class_selection=source.summary() if isinstance(source, SelectedClasses) else None,
        splits={split: dict(sorted(counts.items())) for split, counts in sorted(stats.splits.items())},
        images=stats.images,
        rejected=tuple(stats.rejected),
        duplicates=stats.duplicates,
        kinds=dict(sorted(stats.kinds.items())),
        originals=tuple(original for original, _ in stats.originals),
        values=summarize_values(stats.values),
    )
    drop = job.spec.dataset.on_contradiction == "drop"
    return dataset, resolve_contradictions(dataset, metadata, stats.contradictory, drop=drop)


def _restore_metrics(result: PullResult, metadata: DatasetMetadata, workspace: Workspace) -> None:
    """Expose the metrics of a finished pull again, so that Prometheus can still scrape them."""
    workspace.metrics.set_dataset_images(metadata.images)
    _count_rejected(metadata.rejected, workspace)
    if result.started and result.finished:
        workspace.metrics.restore_stage("pull", result.started, result.finished)


def _count_rejected(rejected: Iterable[RejectedImage], workspace: Workspace) -> None:
    for reason, count in Counter(image.reason for image in rejected).items():
        workspace.metrics.count_rejected_images(reason, count)


def _check_dataset(metadata: DatasetMetadata, job: TransferJob) -> None:
    """Check a dataset against the rules of the spec. Also applies to datasets that were already stored."""
    spec, rejected = job.spec.dataset, list(metadata.rejected)
    if rejected and spec.on_corrupt_image == "fail":
        raise DataError(
            f"Some images are invalid, and spec.dataset.onCorruptImage is fail. {format_rejections(rejected)} "
            "Fix or remove them, or set onCorruptImage: skip."
        )
    contradictions = metadata.contradictions
    if contradictions and spec.on_contradiction == "fail":
        raise DataError(
            f"{contradictions.describe()} Correct their classes, or set spec.dataset.onContradiction to drop or keep."
        )
    dropped = contradictions.images if contradictions and contradictions.dropped else 0
    _check_ratio(metadata, dropped, spec.max_rejected_ratio)
    check_splits(spec, metadata)


def _check_ratio(metadata: DatasetMetadata, dropped: int, limit: float) -> None:
    rejected = list(metadata.rejected)
    ratio = (len(rejected) + dropped) / max(1, len(rejected) + dropped + metadata.images)
    if ratio > limit:
        contradictions = f" {metadata.contradictions.describe()}" if dropped and metadata.contradictions else ""
        raise DataError(
            f"{ratio:.1%} of the images of {metadata.origin} are invalid, more than spec.dataset.maxRejectedRatio "
            f"{limit:g} allows. {format_rejections(rejected)}{contradictions}"
        )


def _log_dataset(metadata: DatasetMetadata) -> None:
    counts = metadata.class_counts
    log.info(
        "dataset",
        name=metadata.name,
        images=metadata.images,
        classes=len(metadata.class_names),
        imbalance=round(max(counts.values()) / max(1, min(counts.values())), 2),
        duplicates=metadata.duplicates,
        rejected=len(metadata.rejected),
    )
    log.info("images per class", counts=_format_counts(counts))
    for note in metadata.class_selection.describe() if metadata.class_selection else ():
        log.info("selected classes", note=note)
    if similar := find_similar_class_names(metadata.class_names):
        log.warning("class names differ only by case, spaces or invisible characters", classes="; ".join(similar[:20]))
    if metadata.rejected:
        reasons = Counter(image.reason for image in metadata.rejected)
        log.warning("images rejected", reasons=_format_counts(reasons))
    if metadata.contradictions:
        log.warning(
            "the same image in several classes",
            groups=metadata.contradictions.groups,
            images=metadata.contradictions.images,
            dropped=metadata.contradictions.dropped,
            examples=metadata.contradictions.describe(),
        )


def _format_counts(counts: Mapping[str, int], limit: int = 20) -> str:
    """Format counts on one line. If there are more than `limit`, show the smallest ones."""
    shown = list(counts.items())
    if len(shown) > limit:
        shown = sorted(shown, key=lambda entry: entry[1])[:limit]
    more = f", and {len(counts) - limit} more" if len(counts) > limit else ""
    return ", ".join(f"{name} {count}" for name, count in shown) + more


def _format_source(source: Source) -> str:
    return json.dumps(source.description())
