"""`topwork describe`: show what each stage of a job would train."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from topwork.cli.options import Overrides, State
from topwork.cli.runtime.environment import default_state_directory
from topwork.cli.runtime.storage import open_optional_storage
from topwork.cli.runtime.tensorflow_import import quiet_tensorflow_import
from topwork.errors import DataError, SettingError, UnavailableError
from topwork.spec import TransferJob
from topwork.spec.loading.loader import read_files

if TYPE_CHECKING:
    from topwork.description.job_description import JobDescription
    from topwork.workspace import Workspace


def describe(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Job specs; - reads standard input.")],
    overrides: Overrides = None,
    classes: Annotated[
        int | None, typer.Option(min=2, max=65536, help="Number of classes, if the dataset is not stored yet.")
    ] = None,
    images: Annotated[
        int | None,
        typer.Option(
            min=1, help="Number of images in the train split of the source, if the dataset is not stored yet."
        ),
    ] = None,
    state: State = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list with one object per job.")] = False,
) -> None:
    """Show what each stage of a job trains, without training, downloading or pulling anything.

    For each stage: trainable and frozen parameters of every layer group, learning rate schedule, steps, epochs,
    optimizer, loss, use of the feature cache, and whether storage has its result already, so that a run reuses it. The
    numbers of classes and images come from the stored dataset if it was pulled, otherwise from --classes and --images.
    Unavailable facts are reported and are not an error.
    """
    jobs = [job for _, job in read_files(files, overrides or ())]
    descriptions = [_describe(job, state or default_state_directory(), classes, images) for job in jobs]
    if as_json:
        content = [description.model_dump(mode="json", by_alias=True) for description in descriptions]
        print(json.dumps(content, indent=2, ensure_ascii=False))
        return
    from topwork.cli.output.description import format_description

    for index, description in enumerate(descriptions):
        for line in (*([""] if index else []), *format_description(description)):
            print(line)


def _describe(job: TransferJob, state: Path, classes: int | None, images: int | None) -> "JobDescription":
    with quiet_tensorflow_import():
        from topwork.description.describe import describe as describe_job
        from topwork.description.known_dataset import find_known_dataset
        from topwork.description.reusable_results import find_reusable_results

    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="topwork-")))
        workspace, notes = None, []
        try:
            workspace = stack.enter_context(_workspace(job, state, scratch))
        except (SettingError, UnavailableError) as error:
            notes.append(str(error))
        data = find_known_dataset(job, workspace, classes, images)
        file, missing = _find_base_file(job, workspace)
        plan = find_reusable_results(job, workspace) if workspace else None
        return describe_job(job, data, file, (*notes, *missing), plan)


@contextmanager
def _workspace(job: TransferJob, state: Path, scratch: Path) -> "Iterator[Workspace | None]":
    """Open the storage of a job; yields None if no storage is configured and nothing is stored on this machine."""
    from topwork.cli.output.progress import NoProgress
    from topwork.clients.prometheus.metrics import Metrics
    from topwork.workspace import Workspace

    with open_optional_storage(job.spec.storage, state) as storage:
        yield Workspace(storage, Metrics(), NoProgress(), scratch) if storage else None


def _find_base_file(job: TransferJob, workspace: "Workspace | None") -> tuple[Path | None, tuple[str, ...]]:
    """Find the saved model or the weights file that a job builds its base from. Nothing is downloaded from Keras.

    Returns:
        The file, or None and the reason if it is unavailable; None without a reason if the base needs no file.
    """
    base = job.spec.model.base
    uri = base.saved.uri if base.saved else str(base.weights or "imagenet")
    if (base.application is None and base.saved is None) or uri == "none":
        return None, ()
    if uri == "imagenet" and (workspace is None or not _has_converted_weights(str(base.application), workspace)):
        return None, ()
    from topwork.training.base_files import fetch_base_file

    path = Path(uri)
    if not uri.startswith("s3://") and path.is_file():
        return path, ()
    key, unknown = ("saved.uri", "the layers of the base are") if base.saved else ("weights", "its input scaling is")
    try:
        if workspace is not None:
            return fetch_base_file(base, workspace), ()
        reason = f"spec.model.base.{key} is {uri}, which is unavailable here."
    except (DataError, SettingError, UnavailableError) as error:
        reason = str(error)
    return None, (f"{reason} Without it, {unknown} unknown.",)


def _has_converted_weights(name: str, workspace: "Workspace") -> bool:
    from topwork.registry.imagenet_weights import find_converted_weights

    try:
        return find_converted_weights(name, workspace.storage) is not None
    except UnavailableError:
        return False  # other notes say that storage is unavailable
