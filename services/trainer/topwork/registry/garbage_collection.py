"""What runs have left in storage that nobody needs: found by its place, its age and what names it.

Never touched: what a manifest or a pointer names, a checkpoint or features of a stage that is not done, mirrored
datasets and weights, and whatever is younger than the age limit, since its writer may still be at work.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from topwork.artifacts import MANIFEST_NAME as MANIFEST
from topwork.artifacts import read_manifest
from topwork.clients.s3.storage import MIN_TIME, Storage, StoredObject, IncompleteUpload
from topwork.data.dataset_manifest import DATASETS_PREFIX
from topwork.errors import DataError
from topwork.registry import versions
from topwork.registry.stage_results import MODEL_KEY

Kind = Literal["half-written", "finished stage", "unreferenced dataset", "unfinished upload"]

_DATASET = re.compile(rf"{DATASETS_PREFIX}/[^/]+/[^/]+(?=/)")
_VERSION = re.compile(rf"{versions.ROOT}/[^/]+/[0-9]+(?=/)")
_CHECKPOINT = re.compile(r"runs/[^/]+/[^/]+/checkpoints/[^/]+(?=/)")
# What a stage keeps while it runs; the stage deletes it when it is done, unless it is killed right then.
_OF_A_STAGE = re.compile(r"(?P<stage>runs/[^/]+/[^/]+)/(checkpoints|features)(?=/)")
# An upload anywhere else is none of topwork's.
_OURS = re.compile(rf"({DATASETS_PREFIX}|runs|{versions.ROOT}|mirror|weights)/")
# Older versions say in their card alone what they were trained on.
_IN_CARD = re.compile(rf"/({DATASETS_PREFIX}/[^/\s]+/[0-9a-f]+)\b")


@dataclass
class Leftover:
    """Something that can go.

    Attributes:
        kind: Why it can.
        prefix: Key of the folder or of the unfinished upload.
        keys: Keys of its objects, the manifest first: without it the rest is not seen any more.
        size: Bytes.
        newest: When the last of it was written, by the server's clock.
        upload: The unfinished upload that it is.
    """

    kind: Kind
    prefix: str
    keys: list[str] = field(default_factory=list)
    size: int = 0
    newest: datetime = MIN_TIME
    upload: IncompleteUpload | None = None

    def add(self, stored: StoredObject) -> None:
        """Count an object in."""
        self.keys.insert(0 if stored.key.endswith(f"/{MANIFEST}") else len(self.keys), stored.key)
        self.size += stored.size
        self.newest = max(self.newest, stored.modified)


def leftovers(storage: Storage, older_than: timedelta) -> list[Leftover]:
    """Find what nobody needs.

    Args:
        storage: Where to look, all below its URI.
        older_than: What was written in this time stays, whatever it is: its writer may still be at work.

    Returns:
        What can go, in the order of the keys.

    Raises:
        DataError: If the mark of a run can't be read.
        UnavailableError: If storage can't be reached.
    """
    before = datetime.now(UTC) - older_than
    stored = list(storage.list())
    found = [
        *_half_written(stored),
        *_finished_folders(stored),
        *_unnamed_models(storage, stored),
        *_unreferenced(storage, stored),
    ]
    # A folder is named once, whatever it can go for.
    by_prefix = {leftover.prefix: leftover for leftover in found if leftover.newest <= before}
    uploads = [
        Leftover(
            "unfinished upload", upload.key, size=storage.multipart_uploads.uploaded_bytes(upload), newest=upload.started, upload=upload
        )
        for upload in storage.multipart_uploads.list_incomplete(older_than_seconds=older_than.total_seconds())
        if _OURS.match(upload.key)
    ]
    inside = [one for one in by_prefix.values() if not _lies_in_another(one, by_prefix)]
    return sorted([*inside, *uploads], key=lambda leftover: leftover.prefix)


def remove(storage: Storage, found: Iterable[Leftover]) -> Iterator[Leftover]:
    """Delete what was found, unless it has come into use meanwhile.

    Args:
        storage: Where it lies.
        found: What `leftovers` found there.

    Yields:
        What was deleted.

    Raises:
        UnavailableError: If storage can't be reached.
    """
    for leftover in found:
        if leftover.upload:
            gone = bool(storage.multipart_uploads.abort([leftover.upload]))
        elif gone := not _came_into_use(storage, leftover):
            storage.delete(leftover.keys)
        if gone:
            yield leftover


def _grouped(stored: Sequence[StoredObject], pattern: re.Pattern[str], kind: Kind) -> dict[str, Leftover]:
    groups: dict[str, Leftover] = {}
    for each in stored:
        if found := pattern.match(each.key):
            groups.setdefault(found[0], Leftover(kind, found[0])).add(each)
    return groups


def _is_whole(folder: Leftover) -> bool:
    return f"{folder.prefix}/{MANIFEST}" in folder.keys


def _half_written(stored: list[StoredObject]) -> list[Leftover]:
    """Datasets, versions and checkpoints without a manifest."""
    return [
        folder
        for pattern in (_DATASET, _VERSION, _CHECKPOINT)
        for folder in _grouped(stored, pattern, "half-written").values()
        if not _is_whole(folder)
    ]


def of_finished_stages(storage: Storage, stored: Sequence[StoredObject]) -> list[Leftover]:
    """Find what stages that are done need no more: they were killed right before they deleted it.

    Args:
        storage: Where the runs lie.
        stored: Objects of runs.

    Returns:
        Checkpoints, features, and models that another process of the run was faster than.
    """
    models = _unnamed_models(storage, stored)
    return _finished_folders(stored) + [model for model in models if model.kind == "finished stage"]


def _finished_folders(stored: Sequence[StoredObject]) -> list[Leftover]:
    keys = {each.key for each in stored}
    return [
        folder
        for prefix, folder in _grouped(stored, _OF_A_STAGE, "finished stage").items()
        if f"{prefix.rpartition('/')[0]}/done.json" in keys
    ]


def _unnamed_models(storage: Storage, stored: Sequence[StoredObject]) -> list[Leftover]:
    """Models that the mark of their stage does not name: the process was killed before, or another one was faster."""
    found = []
    for key, model in _grouped(stored, MODEL_KEY, "half-written").items():
        if kind := _unnamed(storage, key):
            model.kind = kind
            found.append(model)
    return found


def _unnamed(storage: Storage, model: str) -> Kind | None:
    """What a model is that its stage's mark does not name; None where it does, or where nobody can tell."""
    mark = _json(storage, f"{model.rpartition('/')[0]}/done.json")
    if not mark:
        return "half-written"
    return "finished stage" if isinstance(mark, dict) and mark.get("key") != model else None


def _unreferenced(storage: Storage, stored: list[StoredObject]) -> list[Leftover]:
    datasets = _grouped(stored, _DATASET, "unreferenced dataset")
    named = _referenced(storage, stored) if datasets else set()
    return [folder for prefix, folder in datasets.items() if _is_whole(folder) and prefix not in named]


def _referenced(storage: Storage, stored: Iterable[StoredObject]) -> set[str]:
    """Datasets that a run or a published model names."""
    named = set()
    for each in stored:
        if each.key.startswith("runs/") and each.key.endswith("/pull/done.json"):
            named.add(_dataset_of(_json(storage, each.key)))
        elif _VERSION.match(each.key) and each.key.endswith(f"/{MANIFEST}"):
            named |= _datasets_of_version(storage, each.key.rpartition("/")[0])
    return named


def _json(storage: Storage, key: str) -> Any:
    try:
        return json.loads(storage.read(key) or b"{}")
    except ValueError as error:
        raise DataError(
            f"{storage.uri_of(key)} is no JSON ({error}), so that nobody knows which dataset its run needs, and "
            "nothing is deleted. Mend or delete it."
        ) from error


def _dataset_of(content: Any) -> str:
    return str(content.get("dataset", "")) if isinstance(content, dict) else ""


def _datasets_of_version(storage: Storage, prefix: str) -> set[str]:
    manifest = read_manifest(storage, prefix)
    if manifest is None:
        return set()
    if dataset := _dataset_of(manifest.facts):
        return {dataset}
    return set(_IN_CARD.findall((storage.read(f"{prefix}/card.md") or b"").decode(errors="replace")))


def _lies_in_another(leftover: Leftover, found: dict[str, Leftover]) -> bool:
    parts = leftover.prefix.split("/")
    return any("/".join(parts[:length]) in found for length in range(1, len(parts)))


def _came_into_use(storage: Storage, leftover: Leftover) -> bool:
    """Look again right before the deletion: a run may have found the dataset, a writer may have ended its work."""
    if MODEL_KEY.match(leftover.prefix):
        return _unnamed(storage, leftover.prefix) != leftover.kind
    if leftover.kind == "half-written":
        return storage.size(f"{leftover.prefix}/{MANIFEST}") is not None
    if leftover.kind == "unreferenced dataset":
        return leftover.prefix in _referenced(storage, list(storage.list("runs/")))
    return False
