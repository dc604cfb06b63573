"""The pull stage: from the source to a proved dataset in object storage."""

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from topwork.artifacts import read_manifest, read_record, write_whole
from topwork.clients.s3.storage import Storage
from topwork.data.dataset_manifest import DatasetFacts, RejectedImage, StoredDataset, dataset_prefix, shown_rejections
from topwork.data.decode_pool import Provers
from topwork.data.image_validation import REASONS
from topwork.data.sources import Source, open_source
from topwork.data.sources.source import lookalikes
from topwork.data.splits import check_splits
from topwork.disk_space import require_room
from topwork.errors import DataError
from topwork.spec import TransferJob
from topwork.workspace import Workspace

# MAX_MEM_BUFFER_SIZE of tensorflow_datasets.core.shuffle.
SORTED_IN_MEMORY_BYTES = 1000 << 20
FORMAT = 1
"""Version of what is stored. Another one makes every dataset anew."""


class Pulled(BaseModel):
    """The mark of a run whose images are in storage.

    Attributes:
        dataset: Key of their folder.
        started: When the pull that made it was started; None in the mark of an older topwork.
        finished: When it was done.
    """

    model_config = ConfigDict(frozen=True)

    format: int = 1
    dataset: str
    started: datetime | None = None
    finished: datetime | None = None


def pull(job: TransferJob, workspace: Workspace) -> StoredDataset:
    """Bring the images of a job to storage, each proved to decode, unless they are there.

    Args:
        job: The job.
        workspace: Storage, metrics, progress and scratch.

    Returns:
        The stored dataset.

    Raises:
        DataError: If the source holds no usable images, too many do not decode, or the splits do not fit it.
        SettingError: If it takes more than the scratch volume holds.
        UnavailableError: If the source or storage can't be reached, or scratch has no room.
    """
    with workspace.metrics.stage("pull"):
        workspace.metrics.rejectable(REASONS)
        dataset = pulled_earlier(job, workspace) or _of_the_source(job, workspace)
        workspace.metrics.dataset(dataset.facts.images)
        _report(dataset.facts, workspace)
        return dataset


def _done_key(job: TransferJob) -> str:
    return f"runs/{job.run}/pull/done.json"


def pulled_earlier(job: TransferJob, workspace: Workspace) -> StoredDataset | None:
    """Find what a run has pulled, without training libraries: it keeps its images, also where the source has changed.

    Args:
        job: The job of the run.
        workspace: Storage, metrics and progress.

    Returns:
        The dataset; None if there is none, or if somebody has deleted it.
    """
    mark = _mark(job, workspace.storage)
    if mark is None:
        return None
    prefix = mark.dataset
    facts = stored_facts(workspace.storage, prefix)
    if facts is None:
        return None  # somebody deleted the dataset
    workspace.progress.note("already done", stage="pull", dataset=workspace.storage.uri_of(prefix))
    _repeat(mark, facts, workspace)
    return StoredDataset(prefix, facts)


def _mark(job: TransferJob, storage: Storage) -> Pulled | None:
    key = _done_key(job)
    data = storage.read(key)
    if data is None:
        return None
    return read_record(Pulled, data, storage.uri_of(key), "what a finished pull leaves", "start over with --restart")


def _of_the_source(job: TransferJob, workspace: Workspace) -> StoredDataset:
    """Find the dataset of the source in storage, or store it."""
    source = open_source(job.spec.dataset.source, workspace)
    fingerprint = _fingerprint(source)
    prefix = dataset_prefix(source.name, fingerprint)
    facts = stored_facts(workspace.storage, prefix)
    if facts:
        workspace.progress.note("dataset found", uri=workspace.storage.uri_of(prefix), images=facts.images)
        _count_rejected(facts.rejected, workspace)
        _check(facts, job)
    else:
        facts = _store(source, fingerprint, prefix, job, workspace)
    done = Pulled(dataset=prefix, started=workspace.metrics.stage_started("pull"), finished=datetime.now(UTC))
    _keep_mark(job, done, workspace.storage)
    return StoredDataset(prefix, facts)


def _keep_mark(job: TransferJob, done: Pulled, storage: Storage) -> None:
    """Mark the pull as done; another process of the run that was faster keeps its mark and its times."""
    key, data = _done_key(job), done.model_dump_json().encode()
    if storage.write(key, data, only_if_absent=True, content_type="application/json"):
        return
    standing = _mark(job, storage)
    if standing is None or standing.dataset != done.dataset:
        storage.write(key, data, content_type="application/json")


def _fingerprint(source: Source) -> str:
    content = {"format": FORMAT, "source": source.description(), "content": source.digest()}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def stored_facts(storage: Storage, prefix: str) -> DatasetFacts | None:
    """Read the facts of a dataset.

    Args:
        storage: Where it is.
        prefix: Its key.

    Returns:
        The facts; None if it isn't there, or not whole.

    Raises:
        DataError: If its manifest is none of a dataset.
    """
    manifest = read_manifest(storage, prefix)
    if manifest is None:
        return None
    try:
        return DatasetFacts.model_validate(manifest.facts)
    except ValidationError as error:
        raise DataError(
            f"The manifest of {storage.uri_of(prefix)} does not describe a dataset of topwork: "
            f"{error.errors()[0]['msg']}. Delete that folder, manifest first, to have it pulled anew."
        ) from error


def _store(source: Source, fingerprint: str, prefix: str, job: TransferJob, workspace: Workspace) -> DatasetFacts:
    """Prove and write the dataset on scratch, then upload it."""
    _require_room(source, workspace)
    classes = source.class_names()
    if len(classes) < 2:
        raise DataError(
            f"{_where(source)} holds one class only, {', '.join(classes) or 'without a name'}: a classifier needs two "
            f"or more. Expected one folder a class; perhaps the address is one level too high or too low."
        )
    folder = workspace.scratch / "pull" / fingerprint
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        written, facts = _written(source, fingerprint, folder, workspace)
        _check(facts, job)
        # Another pull of the same source may write at the same time: the same files, since they depend on it alone.
        manifest = write_whole(workspace.storage, prefix, written, facts.model_dump(mode="json"))
        return DatasetFacts.model_validate(manifest.facts)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _require_room(source: Source, workspace: Workspace) -> None:
    """Refuse what scratch can't hold before anything is fetched, as far as that can be told."""
    if (room := source.room()) is None:
        return
    # TFDS sorts what is more than its memory in a second copy on disk.
    copies = 2 if room.images > SORTED_IN_MEMORY_BYTES else 1
    what = f"Pulling {_where(source)}"
    workspace.scratch.mkdir(parents=True, exist_ok=True)
    require_room(workspace.scratch, room.fetched + copies * room.images, what, workspace.scratch_limit)


def _written(source: Source, fingerprint: str, folder: Path, workspace: Workspace) -> tuple[Path, DatasetFacts]:
    from topwork.data.decoding import is_readable
    from topwork.data.tfds_writer import write_tfds

    counts = list(source.splits().values())
    total = None if None in counts else sum(count or 0 for count in counts)
    with workspace.track("pull: images", total) as tracker, Provers(readable=is_readable) as provers:
        written, tally = write_tfds(source, provers, folder, tracker.advance)
    _count_rejected(tally.rejected, workspace)
    return written, DatasetFacts(
        name=source.name,
        fingerprint=fingerprint,
        source=source.description(),
        class_names=source.class_names(),
        splits={split: dict(sorted(counts.items())) for split, counts in sorted(tally.splits.items())},
        images=tally.images,
        rejected=tuple(tally.rejected),
        duplicates=tally.duplicates,
    )


def _repeat(mark: Pulled, facts: DatasetFacts, workspace: Workspace) -> None:
    """Set the series of a pull that is done, so that its results are still scraped."""
    workspace.metrics.dataset(facts.images)
    _count_rejected(facts.rejected, workspace)
    if mark.started and mark.finished:
        workspace.metrics.repeat_stage("pull", mark.started, mark.finished)


def _count_rejected(rejected: Iterable[RejectedImage], workspace: Workspace) -> None:
    for reason, count in Counter(image.reason for image in rejected).items():
        workspace.metrics.rejected(reason, count)


def _check(facts: DatasetFacts, job: TransferJob) -> None:
    """Refuse a dataset that the job's spec does not allow; run for a dataset that is found, too."""
    wanted, rejected = job.spec.dataset, list(facts.rejected)
    if rejected and wanted.on_corrupt_image == "fail":
        raise DataError(
            f"spec.dataset.onCorruptImage is fail, and not every image can be used. {shown_rejections(rejected)} "
            f"Mend or remove them, or set onCorruptImage: skip."
        )
    ratio = len(rejected) / max(1, len(rejected) + facts.images)
    if ratio > wanted.max_rejected_ratio:
        raise DataError(
            f"{ratio:.1%} of the images of {facts.origin} can't be used, more than spec.dataset.maxRejectedRatio "
            f"{wanted.max_rejected_ratio:g} allows. {shown_rejections(rejected)}"
        )
    check_splits(wanted.splits, facts)


def _report(facts: DatasetFacts, workspace: Workspace) -> None:
    counts = facts.class_counts
    workspace.progress.note(
        "dataset",
        name=facts.name,
        images=facts.images,
        classes=len(facts.class_names),
        imbalance=round(max(counts.values()) / max(1, min(counts.values())), 2),
        duplicates=facts.duplicates,
        rejected=len(facts.rejected),
    )
    workspace.progress.note("images of each class", counts=_shown(counts))
    if alike := lookalikes(facts.class_names):
        workspace.progress.note("classes that differ by case or spaces alone", classes="; ".join(alike[:20]))
    if facts.rejected:
        reasons = Counter(image.reason for image in facts.rejected)
        workspace.progress.note("images left out", reasons=_shown(reasons))


def _shown(counts: Mapping[str, int], most: int = 20) -> str:
    """Show counts in one line, the rarest first where there are many."""
    shown = list(counts.items())
    if len(shown) > most:
        shown = sorted(shown, key=lambda entry: entry[1])[:most]
    more = f", and {len(counts) - most} more" if len(counts) > most else ""
    return ", ".join(f"{name} {count}" for name, count in shown) + more


def _where(source: Source) -> str:
    return json.dumps(source.description())
