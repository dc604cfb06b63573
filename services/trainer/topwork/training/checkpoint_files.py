"""A checkpoint as a folder in storage: its arrays in one file, all else in its manifest."""

import shutil
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from topwork.errors import DataError, FormatError
from topwork.manifest import fetch_whole, write_whole
from topwork.training.course import Course
from topwork.workspace import Workspace

FORMAT = 1
"""Version of what a checkpoint holds; another one where an older topwork would go on wrongly from it."""

# Values of the variables of a group, in the order of the model's variables.
Values = dict[str, list[np.ndarray]]
GROUPS = frozenset({"model", "optimizer"})
_ARRAYS = "state.npz"


@dataclass(frozen=True)
class Checkpoint:
    """All that a stage needs to go on exactly where it was.

    Attributes:
        course: How far the stage is.
        values: Values of the variables in the groups model, optimizer, metrics and best.
    """

    course: Course
    values: Values

    @property
    def name(self) -> str:
        """Folder of the checkpoint: complete epochs and, within an epoch, the steps done of the next."""
        step = f"-{self.course.step:07}" if self.course.step else ""
        return f"{self.course.epoch:05}{step}"


def write(checkpoint: Checkpoint, prefix: str, workspace: Workspace) -> None:
    """Store a checkpoint.

    Args:
        checkpoint: The checkpoint.
        prefix: Key of its folder.
        workspace: Storage and scratch.

    Raises:
        UnavailableError: If storage can't be reached.
    """
    with tempfile.TemporaryDirectory(dir=workspace.scratch, prefix="checkpoint-") as folder:
        arrays = {
            f"{group}/{index:05}": value
            for group, values in checkpoint.values.items()
            for index, value in enumerate(values)
        }
        with (Path(folder) / _ARRAYS).open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type] # numpy's stub takes the names for its options
        facts = {"format": FORMAT, **checkpoint.course.model_dump(mode="json")}
        write_whole(workspace.storage, prefix, Path(folder), facts)


def read(prefix: str, workspace: Workspace) -> Checkpoint:
    """Fetch a checkpoint.

    Args:
        prefix: Key of its folder.
        workspace: Storage and scratch.

    Returns:
        The checkpoint.

    Raises:
        FormatError: If another topwork wrote it.
        DataError: If a part of it is missing, or it is none.
        DamagedError: If its bytes aren't those that its manifest names.
        UnavailableError: If storage can't be reached.
    """
    folder = workspace.scratch / f"restored-{Path(prefix).name}"
    try:
        facts = fetch_whole(workspace.storage, prefix, folder).facts
        if (found := facts.pop("format", FORMAT)) != FORMAT:
            raise FormatError(
                f"The checkpoint {workspace.storage.uri_of(prefix)} has format {found}, and this topwork reads format "
                f"{FORMAT}. Go on with the topwork that the run was begun with, or start over with --restart."
            )
        values: Values = {}
        with np.load(folder / _ARRAYS) as arrays:
            for key in sorted(arrays.files):
                values.setdefault(key.split("/")[0], []).append(arrays[key])
        if missing := GROUPS - values.keys():
            raise DataError(f"{workspace.storage.uri_of(prefix)} lacks the values of {', '.join(sorted(missing))}.")
        return Checkpoint(Course.model_validate(facts), values)
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise DataError(f"{workspace.storage.uri_of(prefix)} is no checkpoint of topwork: {reason}.") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
