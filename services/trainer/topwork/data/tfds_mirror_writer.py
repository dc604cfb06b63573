"""Copies a prepared TFDS dataset to the mirror in storage."""

from pathlib import Path
from typing import Any

import structlog
import tensorflow_datasets as tfds

from topwork.artifacts import read_manifest, write_artifact
from topwork.data.sources.tfds import TfdsSource, find_image_and_label, load_builder
from topwork.data.tfds_mirror import TfdsName, list_prepared, mirror_prefix
from topwork.errors import DataError, SettingError, quote_error
from topwork.workspace import Workspace

log = structlog.get_logger(__name__)


def mirror_tfds(name: str, workspace: Workspace, data_dir: Path | None = None) -> tuple[str, bool]:
    """Copy a dataset to the mirror, unless it is already there.

    Example:
        ```python
        full_name, already_mirrored = mirror_tfds("cats_vs_dogs:4.0.1", workspace)
        ```

    Args:
        name: As in `spec.dataset.source.tfds`: `name[/config][:version]`.
        workspace: Storage and scratch. Scratch keeps interrupted downloads.
        data_dir: Local directory in which TFDS has prepared the dataset; None downloads and prepares it.

    Returns:
        The full name of the dataset, and whether it was already mirrored.

    Raises:
        DataError: If the dataset does not exist, is incomplete, or is not an image classification dataset.
        SettingError: If `data_dir` does not contain the dataset.
        UnavailableError: If a download or storage fails.
    """
    if data_dir is None:
        source = TfdsSource(name, workspace)
        full_name = str(source.description()["tfds"])
        if source.is_mirrored:
            return full_name, True
        directory = source.directory
    else:
        full_name = _find_prepared(name, data_dir, workspace)
        directory = data_dir / full_name
        if read_manifest(workspace.storage, mirror_prefix(full_name)):
            return full_name, True
    info = _validate(directory).info
    splits = {split_name: int(split.num_examples) for split_name, split in info.splits.items()}
    files = [path.name for path in directory.iterdir() if path.is_file()]
    log.info("mirroring TFDS dataset", dataset=full_name, files=len(files))
    write_artifact(
        workspace.storage, mirror_prefix(full_name), directory, {"tfds": full_name, "splits": splits}, files=files
    )
    return full_name, False


def _find_prepared(name: str, data_dir: Path, workspace: Workspace) -> str:
    """Return the full name of a dataset in a local directory."""
    tfds_name = TfdsName.parse(name)
    available = list_prepared(data_dir, tfds_name.name)
    builder = load_builder(name, workspace.scratch / "unused")
    provided = None if isinstance(builder, Exception) else str(builder.info.full_name)
    full_name = tfds_name.select(available, provided)
    if full_name:
        return full_name
    hint = f" It contains {', '.join(sorted(available))}: specify the version to use." if available else ""
    raise SettingError(
        f"{data_dir} does not contain a prepared {provided or name}. Expected the files that tfds.load('{name}', "
        f"data_dir='{data_dir}') writes.{hint}"
    )


def _validate(directory: Path) -> Any:
    """Return the builder of a prepared dataset, after checking its features and that no file is missing."""
    try:
        builder = tfds.builder_from_directory(directory)
    except (ValueError, OSError) as error:
        raise DataError(f"{directory} is not a prepared TFDS dataset: {quote_error(error)}") from error
    find_image_and_label(builder)
    files = [Path(path) for split in builder.info.splits.values() for path in split.filepaths]
    missing = [path.name for path in files if not path.is_file()]
    if missing or not files:
        reason = f"{len(missing)} of {len(files)} files are missing, such as {missing[0]}" if files else "no splits"
        raise DataError(f"{directory} is incomplete: {reason}. Prepare it again with TFDS.")
    return builder
