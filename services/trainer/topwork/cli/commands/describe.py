"""`topwork describe`: what jobs would train, stage by stage, without training anything."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from topwork.cli.options import Overrides
from topwork.cli.runtime.environment import default_state_directory, has_storage_configuration
from topwork.cli.runtime.tensorflow_import import quiet_tensorflow_import
from topwork.errors import DataError, SettingError, UnavailableError
from topwork.spec import TransferJob
from topwork.spec.loading.loader import read_files

if TYPE_CHECKING:
    from topwork.clients.s3.storage import Storage
    from topwork.description.job_description import Description
    from topwork.workspace import Workspace

# Whoever describes a job waits for no storage that is not there.
ATTEMPTS, CONNECT_SECONDS = 2, 3.0


def describe(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Job specs; - reads standard input.")],
    overrides: Overrides = None,
    classes: Annotated[
        int | None, typer.Option(min=2, max=65536, help="Number of classes, where no dataset is stored yet.")
    ] = None,
    images: Annotated[
        int | None, typer.Option(min=1, help="Images of the source's train split, where no dataset is stored yet.")
    ] = None,
    state: Annotated[
        Path | None, typer.Option(help="Folder of the embedded S3 [default: ~/.local/state/topwork].")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a list with one object for each job.")] = False,
) -> None:
    """Show what each stage of a job trains, without training, downloading or pulling anything.

    For each stage the trainable and frozen parameters of every layer group, the learning rate and its course, steps
    and epochs, optimizer, loss, and whether the feature cache serves. Classes and images are those of the dataset in
    storage, if it was pulled, else as --classes and --images say. What can't be had is said so, and is no error.
    """
    jobs = [job for _, job in read_files(files, overrides or ())]
    found = [_describe(job, state or default_state_directory(), classes, images) for job in jobs]
    if as_json:
        print(json.dumps([one.model_dump(mode="json", by_alias=True) for one in found], indent=2, ensure_ascii=False))
        return
    from topwork.cli.output.description import lines

    for index, one in enumerate(found):
        for line in (*([""] if index else []), *lines(one)):
            print(line)


def _describe(job: TransferJob, state: Path, classes: int | None, images: int | None) -> "Description":
    with quiet_tensorflow_import():
        from topwork.description.describe import describe as described
        from topwork.description.known_dataset import known_data

    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="topwork-")))
        workspace, notes = None, []
        try:
            workspace = stack.enter_context(_workspace(job, state, scratch))
        except (SettingError, UnavailableError) as error:
            notes.append(str(error))
        data = known_data(job, workspace, classes, images)
        file, missing = _saved(job, workspace)
        return described(job, data, file, (*notes, *missing))


@contextmanager
def _workspace(job: TransferJob, state: Path, scratch: Path) -> "Iterator[Workspace | None]":
    """Open the storage of a job, if there is one; None where nothing has been stored on this machine."""
    from topwork.cli.output.progress import NoProgress
    from topwork.clients.prometheus.metrics import Metrics
    from topwork.workspace import Workspace

    with _storage(job.spec.storage, state) as storage:
        yield Workspace(storage, Metrics(), NoProgress(), scratch) if storage else None


@contextmanager
def _storage(uri: str, state: Path) -> "Iterator[Storage | None]":
    """Open the user's own storage, or the embedded one where an earlier run has left something in it."""
    from topwork.clients.s3.storage import Storage, StorageSettings

    with ExitStack() as stack:
        if has_storage_configuration():
            settings = StorageSettings(attempts=ATTEMPTS, connect_timeout_seconds=CONNECT_SECONDS)
        elif (state / "data").is_dir():
            from topwork.local.server import embedded_storage

            settings = stack.enter_context(embedded_storage(state))
        else:
            yield None
            return
        storage = Storage(uri, settings)
        storage.check()
        yield storage


def _saved(job: TransferJob, workspace: "Workspace | None") -> tuple[Path | None, tuple[str, ...]]:
    """Find the saved model that a job stands on.

    Returns:
        The file, or None and why it can't be had; None and nothing where the base is another.
    """
    saved = job.spec.model.base.saved
    if saved is None:
        return None, ()
    from topwork.training.base_files import fetch_base_file

    path = Path(saved.uri.removeprefix("file://"))
    if not saved.uri.startswith("s3://") and path.is_file():
        return path, ()
    try:
        if workspace is not None:
            return fetch_base_file(job.spec.model.base, workspace), ()
        reason = f"spec.model.base.saved.uri is {saved.uri}, which can't be had here."
    except (DataError, SettingError, UnavailableError) as error:
        reason = str(error)
    return None, (f"{reason} The layers of the base aren't known without it.",)
