"""Brings a prepared TFDS dataset into storage: prepared by TFDS now, or found on this machine."""

from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from topwork.artifacts import read_manifest, write_whole
from topwork.data.sources.tfds import TfdsSource, image_and_label, known_to_tfds
from topwork.data.tfds_mirror import AskedName, prefix_of, prepared_in
from topwork.errors import DataError, SettingError
from topwork.workspace import Workspace


def mirror_tfds(name: str, workspace: Workspace, data_dir: Path | None = None) -> tuple[str, bool]:
    """Bring a dataset into the mirror, unless it is there.

    Args:
        name: As in `spec.dataset.source.tfds`: `name[/config][:version]`.
        workspace: Storage, progress and scratch, which keeps a download that breaks off.
        data_dir: Local folder where TFDS has prepared it; None lets TFDS download and prepare it now.

    Returns:
        Its full name, and whether it was there.

    Raises:
        DataError: If there is no such dataset, it is no dataset for image classification, or isn't whole.
        SettingError: If `data_dir` doesn't hold it.
        UnavailableError: If a download or storage failed.
    """
    if data_dir is None:
        source = TfdsSource(name, workspace)
        full = str(source.description()["tfds"])
        if source.mirrored:
            return full, True
        folder = source.folder
    else:
        full = _prepared(name, data_dir, workspace)
        folder = data_dir / full
        if read_manifest(workspace.storage, prefix_of(full)):
            return full, True
    builder = _proved(folder)
    facts = {"tfds": full, "splits": {name: int(split.num_examples) for name, split in builder.info.splits.items()}}
    files = [path.name for path in folder.iterdir() if path.is_file()]
    workspace.progress.note("mirroring", dataset=full, files=len(files))
    write_whole(workspace.storage, prefix_of(full), folder, facts, files=files)
    return full, False


def _prepared(name: str, data_dir: Path, workspace: Workspace) -> str:
    """Find the full name of a dataset in a local folder."""
    asked = AskedName.parse(name)
    there = prepared_in(data_dir, asked.name)
    known = known_to_tfds(name, workspace.scratch / "unused")
    made = None if isinstance(known, Exception) else str(known.info.full_name)
    found = asked.pick(there, made)
    if found:
        return found
    others = f" It holds {', '.join(sorted(there))}: name the version that you want." if there else ""
    raise SettingError(
        f"{data_dir} holds no prepared {made or name}. Expected what tfds.load('{name}', data_dir='{data_dir}') "
        f"leaves there.{others}"
    )


def _proved(folder: Path) -> Any:
    """Read a prepared dataset back: its features, and that no file is missing."""
    try:
        builder = tfds.builder_from_directory(folder)
    except (ValueError, OSError) as error:
        raise DataError(f"{folder} is no prepared TFDS dataset: {error}") from error
    image_and_label(builder)
    files = [Path(path) for split in builder.info.splits.values() for path in split.filepaths]
    missing = [path.name for path in files if not path.is_file()]
    if missing or not files:
        what = f"{len(missing)} of its {len(files)} files are missing, such as {missing[0]}" if files else "no split"
        raise DataError(f"{folder} isn't whole: {what}. Let TFDS prepare it anew.")
    return builder
