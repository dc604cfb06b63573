"""Garbage collection: finds and deletes unreferenced objects in storage.

Never deleted: anything that a manifest or `latest.json` references, checkpoints and features of unfinished stages,
mirrored datasets and weights, and anything younger than the age limit, because its writer may still be running. Kept
checkpoints are deleted with the result of their stage, and features of trials when no run has used them for that time.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, cast

from pydantic import ValidationError

from topwork.artifacts import MANIFEST_NAME as MANIFEST
from topwork.artifacts import read_manifest
from topwork.clients.s3.storage import MIN_TIME, IncompleteUpload, Storage, StoredObject
from topwork.data.dataset_manifest import DATASETS_PREFIX
from topwork.errors import DataError
from topwork.registry import versions
from topwork.registry.shared_features import ROOT as FEATURES
from topwork.registry.stage_results import (
    MODEL_KEY,
    StageReference,
    TrainingStage,
    last_checkpoint_prefix,
    result_prefix,
)
from topwork.registry.stage_results import ROOT as STAGES

Kind = Literal[
    "half-written",
    "finished stage",
    "unused features",
    "unreferenced dataset",
    "unreferenced stage result",
    "unfinished upload",
]

_DATASET = re.compile(rf"{DATASETS_PREFIX}/[^/]+/[^/]+(?=/)")
_VERSION = re.compile(rf"{versions.ROOT}/[^/]+/[0-9]+(?=/)")
# Results of the training stages, and the same in the layout of topwork 0.1.
_STAGE = rf"(?P<stage>(?:{STAGES}|runs)/[^/]+/[^/]+)"
_RESULT = re.compile(rf"{STAGES}/[^/]+/[^/]+(?=/)")
_CHECKPOINT = re.compile(rf"{_STAGE}(?:/runs/[^/]+)?/checkpoints/[^/]+(?=/)")
# Checkpoints that longer stages continue from, and the records by which they are found.
_LAST_CHECKPOINT = re.compile(rf"{STAGES}/[^/]+/[^/]+/last-checkpoint/[^/]+(?=/)")
_CONTINUED = re.compile(rf"{STAGES}/(?P<stage>[^/]+)/continued/[^/]+/\d+-(?P<key>[^/-]+)-(?P<input>[^/-]+)\.json")
_FEATURES = re.compile(rf"{FEATURES}/[^/]+(?=/)")
# Intermediate files of a stage. The stage deletes them when it finishes, unless it is killed at that moment.
_INTERMEDIATE = re.compile(rf"{_STAGE}(?:/runs/[^/]+)?/(?:checkpoints|features)(?=/)")
# Files of a writer whose artifact another writer completed; see `topwork.artifacts`.
_ATTEMPT = re.compile(r"(?P<artifact>.+)/(?P<directory>attempt-[0-9a-f]{32})(?=/)")
_REFERENCE = re.compile(r"runs/[^/]+/(?:transfer|fine-tune)/done\.json")
# Uploads with other keys do not belong to topwork.
_TOPWORK_KEYS = re.compile(rf"({DATASETS_PREFIX}|runs|{STAGES}|{FEATURES}|{versions.ROOT}|mirror|weights)/")
# Older versions of topwork record the dataset of a published model only in its model card.
_DATASET_IN_CARD = re.compile(rf"/({DATASETS_PREFIX}/[^/\s]+/[0-9a-f]+)\b")


@dataclass
class Leftover:
    """A group of objects that can be deleted.

    Attributes:
        kind: Why it can be deleted.
        prefix: Key prefix of the objects, or key of the unfinished upload.
        keys: Keys of the objects. The manifest or `done.json` comes first: without it, readers ignore the rest.
        size: Total size in bytes.
        newest: Modification time of the newest object, by the clock of the server.
        upload: The unfinished upload; None if this is a group of objects.
    """

    kind: Kind
    prefix: str
    keys: list[str] = field(default_factory=list)
    size: int = 0
    newest: datetime = MIN_TIME
    upload: IncompleteUpload | None = None

    def add(self, stored: StoredObject) -> None:
        """Add an object."""
        comes_first = stored.key.endswith((f"/{MANIFEST}", "/done.json"))
        self.keys.insert(0 if comes_first else len(self.keys), stored.key)
        self.size += stored.size
        self.newest = max(self.newest, stored.modified)


def find_leftovers(storage: Storage, older_than: timedelta) -> list[Leftover]:
    """Find objects that are no longer needed.

    Args:
        storage: Storage to search; everything below its URI.
        older_than: Minimum age. Newer objects are kept, because their writer may still be running.

    Returns:
        Groups of objects that can be deleted, sorted by key prefix.

    Raises:
        DataError: If the `done.json` of a run is unreadable.
        UnavailableError: If storage is unreachable.
    """
    cutoff = datetime.now(UTC) - older_than
    stored = list(storage.list())
    leftovers = [
        *_find_incomplete(stored),
        *_find_unused_attempts(storage, stored),
        *_find_intermediate_files(stored),
        *_group_by_prefix(stored, _FEATURES, "unused features").values(),
        *_find_records_without_checkpoint(stored),
        *_find_unreferenced_models(storage, stored),
        *_find_unreferenced_datasets(storage, stored),
        *_find_unreferenced_results(storage, stored),
    ]
    # List each prefix once, even if it can be deleted for several reasons.
    by_prefix = {leftover.prefix: leftover for leftover in leftovers if leftover.newest <= cutoff}
    uploads = [
        Leftover(
            "unfinished upload",
            upload.key,
            size=storage.multipart_uploads.uploaded_bytes(upload),
            newest=upload.started,
            upload=upload,
        )
        for upload in storage.multipart_uploads.list_incomplete(older_than_seconds=older_than.total_seconds())
        if _TOPWORK_KEYS.match(upload.key)
    ]
    outermost = [leftover for leftover in by_prefix.values() if not _is_inside_another(leftover, by_prefix)]
    return sorted([*outermost, *uploads], key=lambda leftover: leftover.prefix)


def delete_leftovers(storage: Storage, found: Iterable[Leftover]) -> Iterator[Leftover]:
    """Delete leftovers, except those that have become referenced in the meantime.

    Args:
        storage: Storage of the leftovers.
        found: Result of `find_leftovers`.

    Yields:
        The deleted leftovers.

    Raises:
        UnavailableError: If storage is unreachable.
    """
    for leftover in found:
        if leftover.upload:
            deleted = bool(storage.multipart_uploads.abort([leftover.upload]))
        elif deleted := not _is_referenced_now(storage, leftover):
            storage.delete(leftover.keys)
        if deleted:
            yield leftover


def _group_by_prefix(stored: Sequence[StoredObject], pattern: re.Pattern[str], kind: Kind) -> dict[str, Leftover]:
    groups: dict[str, Leftover] = {}
    for item in stored:
        if match := pattern.match(item.key):
            groups.setdefault(match[0], Leftover(kind, match[0])).add(item)
    return groups


def _is_complete(group: Leftover) -> bool:
    return f"{group.prefix}/{MANIFEST}" in group.keys


def _find_incomplete(stored: list[StoredObject]) -> list[Leftover]:
    """Find datasets, versions and checkpoints without a manifest."""
    return [
        group
        for pattern in (_DATASET, _VERSION, _CHECKPOINT, _LAST_CHECKPOINT)
        for group in _group_by_prefix(stored, pattern, "half-written").values()
        if not _is_complete(group)
    ]


def _find_unused_attempts(storage: Storage, stored: list[StoredObject]) -> list[Leftover]:
    """Find files that the manifest of their artifact does not name. Without a manifest, the artifact is incomplete."""
    attempts = _group_by_prefix(stored, _ATTEMPT, "half-written")
    return [attempt for prefix, attempt in attempts.items() if _is_unused_attempt(storage, prefix)]


def _is_unused_attempt(storage: Storage, prefix: str) -> bool:
    artifact, _, directory = prefix.rpartition("/")
    manifest = read_manifest(storage, artifact)
    return manifest is not None and manifest.directory != directory


def _find_intermediate_files(stored: Sequence[StoredObject]) -> list[Leftover]:
    keys = {item.key for item in stored}
    return [
        group
        for prefix, group in _group_by_prefix(stored, _INTERMEDIATE, "finished stage").items()
        if (match := _INTERMEDIATE.match(f"{prefix}/")) and f"{match['stage']}/done.json" in keys
    ]


def _find_records_without_checkpoint(stored: Sequence[StoredObject]) -> list[Leftover]:
    keys = {item.key for item in stored}
    records = _group_by_prefix(stored, _CONTINUED, "finished stage")
    return [record for name, record in records.items() if _manifest_of_record(name) not in keys]


def _manifest_of_record(name: str) -> str:
    match = _CONTINUED.fullmatch(name)
    if match is None:
        raise ValueError(f"{name} is not the key of a record of a kept checkpoint")
    stage = cast("TrainingStage", match["stage"])
    return f"{last_checkpoint_prefix(stage, match['key'], match['input'])}/{MANIFEST}"


def _find_unreferenced_models(storage: Storage, stored: Sequence[StoredObject]) -> list[Leftover]:
    """Find models that the `done.json` of their stage does not reference: their process was killed or lost a race."""
    unreferenced = []
    for key, model in _group_by_prefix(stored, MODEL_KEY, "half-written").items():
        if kind := _unreferenced_model_kind(storage, key):
            model.kind = kind
            unreferenced.append(model)
    return unreferenced


def _unreferenced_model_kind(storage: Storage, model: str) -> Kind | None:
    """Return the kind of an unreferenced model, or None if it is referenced or this is unknown."""
    result = _read_json(storage, f"{model.rpartition('/')[0]}/done.json")
    if not result:
        return "half-written"
    return "finished stage" if isinstance(result, dict) and result.get("key") != model else None


def _find_unreferenced_datasets(storage: Storage, stored: list[StoredObject]) -> list[Leftover]:
    datasets = _group_by_prefix(stored, _DATASET, "unreferenced dataset")
    referenced = _referenced_datasets(storage, stored) if datasets else set()
    return [group for prefix, group in datasets.items() if _is_complete(group) and prefix not in referenced]


def _referenced_datasets(storage: Storage, stored: Iterable[StoredObject]) -> set[str]:
    """Return the datasets that a run or a published model references."""
    referenced = set()
    for item in stored:
        if item.key.startswith("runs/") and item.key.endswith("/pull/done.json"):
            referenced.add(_dataset_key(_read_json(storage, item.key)))
        elif _VERSION.match(item.key) and item.key.endswith(f"/{MANIFEST}"):
            referenced |= _datasets_of_version(storage, item.key.rpartition("/")[0])
    return referenced


def _find_unreferenced_results(storage: Storage, stored: list[StoredObject]) -> list[Leftover]:
    """Find results of training stages that no run uses, for example because their run was restarted."""
    results = _group_by_prefix(stored, _RESULT, "unreferenced stage result")
    complete = {prefix: result for prefix, result in results.items() if f"{prefix}/done.json" in result.keys}
    referenced = _referenced_results(storage, stored) if complete else set()
    return [result for prefix, result in complete.items() if prefix not in referenced]


def _referenced_results(storage: Storage, stored: Iterable[StoredObject]) -> set[str]:
    referenced = set()
    for item in stored:
        if _REFERENCE.fullmatch(item.key):
            with suppress(ValidationError):  # a result in the layout of topwork 0.1
                reference = StageReference.model_validate(_read_json(storage, item.key))
                referenced.add(result_prefix(reference.stage, reference.key))
    return referenced


def _read_json(storage: Storage, key: str) -> Any:
    try:
        return json.loads(storage.read(key) or b"{}")
    except ValueError as error:
        raise DataError(
            f"{storage.uri_of(key)} is not valid JSON ({error}), so the dataset of its run is unknown. Nothing is "
            "deleted. Fix or delete that object."
        ) from error


def _dataset_key(content: Any) -> str:
    return str(content.get("dataset", "")) if isinstance(content, dict) else ""


def _datasets_of_version(storage: Storage, prefix: str) -> set[str]:
    manifest = read_manifest(storage, prefix)
    if manifest is None:
        return set()
    if dataset := _dataset_key(manifest.facts):
        return {dataset}
    return set(_DATASET_IN_CARD.findall((storage.read(f"{prefix}/card.md") or b"").decode(errors="replace")))


def _is_inside_another(leftover: Leftover, by_prefix: dict[str, Leftover]) -> bool:
    parts = leftover.prefix.split("/")
    return any("/".join(parts[:length]) in by_prefix for length in range(1, len(parts)))


def _is_referenced_now(storage: Storage, leftover: Leftover) -> bool:
    """Check again right before deletion: a run may now use the dataset, or a writer may have finished."""
    if MODEL_KEY.match(leftover.prefix):
        return _unreferenced_model_kind(storage, leftover.prefix) != leftover.kind
    if _CONTINUED.fullmatch(leftover.prefix):
        return storage.size(_manifest_of_record(leftover.prefix)) is not None
    if leftover.kind == "unused features":
        users = storage.list(f"{leftover.prefix}/used-by/")
        return any(user.key not in leftover.keys or user.modified > leftover.newest for user in users)
    if _ATTEMPT.match(f"{leftover.prefix}/"):
        return not _is_unused_attempt(storage, leftover.prefix)
    if leftover.kind == "half-written":
        return storage.size(f"{leftover.prefix}/{MANIFEST}") is not None
    if leftover.kind == "unreferenced dataset":
        return leftover.prefix in _referenced_datasets(storage, list(storage.list("runs/")))
    if leftover.kind == "unreferenced stage result":
        return leftover.prefix in _referenced_results(storage, list(storage.list("runs/")))
    return False
