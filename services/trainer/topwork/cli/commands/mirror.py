"""`topwork mirror`: copy weights and datasets into storage, so that jobs need no internet access."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer

from topwork.cli.options import Overrides, State
from topwork.cli.output.progress import open_progress
from topwork.cli.runtime.environment import default_state_directory, hide_gpus
from topwork.cli.runtime.storage import lock_scratch, open_storage
from topwork.cli.runtime.tensorflow_import import quiet_tensorflow_import
from topwork.clients.prometheus.metrics import Metrics
from topwork.errors import SettingError
from topwork.spec.applications import MIN_SIDE
from topwork.spec.job import JobSpec
from topwork.spec.loading.loader import read_files
from topwork.spec.messages import did_you_mean
from topwork.workspace import Workspace

app = typer.Typer(
    help="Copy weights and datasets into storage, for jobs without internet access.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

# The names of NORMALIZATIONS in topwork.model.conversion.source_models, which imports Keras.
Normalization = Literal["imagenet", "half", "none", "clip", "caffe"]
StorageUri = Annotated[str, typer.Argument(metavar="STORAGE", help="s3://bucket/prefix, as in spec.storage.")]


@app.command()
def weights(
    storage_uri: StorageUri,
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME...", help="Models of keras.applications whose ImageNet weights Keras downloads."),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--from",
            help="Copy the weights in this file instead of downloading: a file written by model.save_weights without "
            "the head, a *_notop.h5 file of Keras, or a state dict (.safetensors, .pth) of PyTorch, torchvision or "
            "timm, which is converted.",
        ),
    ] = None,
    application: Annotated[
        str | None, typer.Option("--as", metavar="APPLICATION", help="Model that the weights of --from belong to.")
    ] = None,
    source_model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Model that a state dict comes from, such as timm/tf_efficientnet_b0.in1k or torchvision/resnet50. "
            "Required: models with equal tensors compute differently. Only EfficientNetLite0 needs none.",
        ),
    ] = None,
    normalization: Annotated[
        Normalization | None,
        typer.Option(
            help="Input normalization that a state dict was trained with, by mean and deviation of pixels in 0..1: "
            "imagenet, half (0.5 and 0.5), none (0 and 1), clip, or caffe (1/255 as the deviation). Needed if several "
            "are usual."
        ),
    ] = None,
    state: State = None,
) -> None:
    """Copy ImageNet weights, unless they are already in storage.

    Models of the same name can compute differently in Keras and PyTorch: they pad, stride and normalize differently.
    Converted weights are stored with a description of these differences, and jobs then compute the features of the
    original model. What was assumed about the original model is printed.
    """
    models = _select_models(names or [], file, application)
    if file is None and (source_model or normalization):
        raise SettingError("--source-model and --normalization describe the file of --from, which is missing.")
    with _open_workspace(storage_uri, state) as workspace:
        for name in models:
            if file:
                _mirror_file(name, workspace, file, source_model, normalization)
            else:
                _mirror_weights(name, workspace)


def _select_models(names: list[str], file: Path | None, application: str | None) -> list[str]:
    """Return the models to copy: those named, or the one that --from and --as describe."""
    if (file is None) != (application is None):
        raise SettingError("--from and --as belong together: --from FILE --as APPLICATION.")
    if bool(names) == (application is not None):
        raise SettingError(
            "Name either models to download, or a file and its model: STORAGE NAME..., or STORAGE --from FILE --as "
            "APPLICATION."
        )
    for name in (selected := names or [str(application)]):
        if name not in MIN_SIDE:
            raise SettingError(
                f"{name} is not a classification model of keras.applications.{did_you_mean(name, MIN_SIDE)}"
            )
    if file and not file.is_file():
        raise SettingError(f"--from {file} does not exist or is not a file.")
    return selected


@app.command()
def tfds(
    storage_uri: StorageUri,
    name: Annotated[str, typer.Argument(help="TensorFlow Datasets name: name[/config][:version].")],
    data_dir: Annotated[
        Path | None,
        typer.Option(help="Copy the dataset that tfds.load(…, data_dir=DIR) prepared here instead of downloading."),
    ] = None,
    state: State = None,
) -> None:
    """Copy a dataset as prepared by TFDS, unless it is already in storage."""
    if data_dir and not data_dir.is_dir():
        raise SettingError(f"--data-dir {data_dir} does not exist or is not a directory.")
    with _open_workspace(storage_uri, state) as workspace:
        _mirror_tfds(name, workspace, data_dir)


@app.command()
def job(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Job specs; - reads standard input.")],
    overrides: Overrides = None,
    state: State = None,
) -> None:
    """Copy the ImageNet weights and TFDS datasets that jobs would download, each into the storage of its job."""
    for _, transfer_job in read_files(files, overrides or ()):
        if not _needs_downloads(transfer_job.spec):
            print(f"{transfer_job.metadata.name} downloads neither weights nor a TFDS dataset.")
            continue
        with _open_workspace(transfer_job.spec.storage, state) as workspace:
            base, source = transfer_job.spec.model.base, transfer_job.spec.dataset.source
            if base.needs_imagenet:
                _mirror_weights(str(base.application), workspace)
            if source.tfds:
                _mirror_tfds(source.tfds, workspace)


def _needs_downloads(spec: JobSpec) -> bool:
    return spec.model.base.needs_imagenet or spec.dataset.source.tfds is not None


def _mirror_weights(name: str, workspace: Workspace) -> None:
    with quiet_tensorflow_import():
        from topwork.training.base_files import mirror_weights

    mirrored = mirror_weights(name, workspace)
    print(f"{'found' if mirrored.existed else 'mirrored'} {workspace.storage.uri_of(mirrored.key)}")


def _mirror_file(
    name: str, workspace: Workspace, file: Path, source_model: str | None, normalization: str | None
) -> None:
    with quiet_tensorflow_import():
        from topwork.training.base_files import mirror_weights_file

    mirrored = mirror_weights_file(name, workspace, file, source_model, normalization)
    print(f"{'found' if mirrored.existed else 'mirrored'} {workspace.storage.uri_of(mirrored.key)}")
    if mirrored.variant:
        print(f"converted as {mirrored.variant.describe()}")


def _mirror_tfds(name: str, workspace: Workspace, data_dir: Path | None = None) -> None:
    with quiet_tensorflow_import():
        from topwork.data.tfds_mirror import mirror_prefix
        from topwork.data.tfds_mirror_writer import mirror_tfds

    full_name, existed = mirror_tfds(name, workspace, data_dir)
    print(f"{'found' if existed else 'mirrored'} {workspace.storage.uri_of(mirror_prefix(full_name))}/")


@contextmanager
def _open_workspace(storage_uri: str, state: Path | None) -> Iterator[Workspace]:
    # Mirroring needs no GPU, and other processes may use the GPUs.
    hide_gpus()
    state = state or default_state_directory()
    with lock_scratch(state, "mirror") as scratch, open_storage(storage_uri, state) as storage:
        yield Workspace(storage, Metrics(), open_progress(), scratch)
