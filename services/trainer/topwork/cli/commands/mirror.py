"""`topwork mirror`: copy what jobs would download into their storage, so that they need no way out."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from topwork.cli.options import Overrides
from topwork.cli.runtime.environment import default_state, quiet_start, scratch_of, storage_at
from topwork.clients.prometheus.metrics import Metrics
from topwork.errors import SettingError
from topwork.progress import BarProgress, LineProgress
from topwork.spec.applications import LEAST_SIDE
from topwork.spec.job import JobSpec
from topwork.spec.loading.loader import read_files
from topwork.spec.messages import hint
from topwork.workspace import Workspace

app = typer.Typer(
    help="Copy weights and datasets into storage beforehand, for jobs that can't reach the internet.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

StorageUri = Annotated[str, typer.Argument(metavar="STORAGE", help="s3://bucket/prefix, as spec.storage.")]
State = Annotated[
    Path | None, typer.Option(help="Folder of scratch and embedded S3 [default: ~/.local/state/topwork].")
]


@app.command()
def weights(
    storage_uri: StorageUri,
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Models of keras.applications.")],
    file: Annotated[
        Path | None,
        typer.Option(
            help="Take this file (model.save_weights without the head, or Keras' *_notop.h5) instead of downloading.",
        ),
    ] = None,
    state: State = None,
) -> None:
    """Copy ImageNet weights; those that are there stay."""
    for name in names:
        if name not in LEAST_SIDE:
            raise SettingError(f"{name} is no classification model of keras.applications.{hint(name, LEAST_SIDE)}")
    if file and len(names) > 1:
        raise SettingError(f"--file holds the weights of one model, and {len(names)} are named. Name one.")
    if file and not file.is_file():
        raise SettingError(f"--file {file} is no file here.")
    with _workspace(storage_uri, state) as workspace:
        for name in names:
            _weights(name, workspace, file)


@app.command()
def tfds(
    storage_uri: StorageUri,
    name: Annotated[str, typer.Argument(help="TensorFlow Datasets name: name[/config][:version].")],
    data_dir: Annotated[
        Path | None,
        typer.Option(
            help="Take the dataset that tfds.load(…, data_dir=DIR) left here instead of downloading.",
        ),
    ] = None,
    state: State = None,
) -> None:
    """Copy a dataset as TFDS prepares it; one that is there stays."""
    if data_dir and not data_dir.is_dir():
        raise SettingError(f"--data-dir {data_dir} is no folder here.")
    with _workspace(storage_uri, state) as workspace:
        _tfds(name, workspace, data_dir)


@app.command()
def job(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Job specs; - reads standard input.")],
    overrides: Overrides = None,
    state: State = None,
) -> None:
    """Copy all that jobs would download: ImageNet weights and TFDS datasets, each into the job's own storage."""
    for _, read in read_files(files, overrides or ()):
        if not _downloads(read.spec):
            print(f"{read.metadata.name} downloads nothing that is mirrored.")
            continue
        with _workspace(read.spec.storage, state) as workspace:
            base, source = read.spec.model.base, read.spec.dataset.source
            if base.needs_imagenet:
                _weights(str(base.application), workspace)
            if source.tfds:
                _tfds(source.tfds, workspace)


def _downloads(spec: JobSpec) -> bool:
    return spec.model.base.needs_imagenet or spec.dataset.source.tfds is not None


def _weights(name: str, workspace: Workspace, file: Path | None = None) -> None:
    with quiet_start():
        from topwork.training.base_files import mirror_key, mirror_weights

    found = mirror_weights(name, workspace, file)
    print(f"{'found' if found else 'mirrored'} {workspace.storage.uri_of(mirror_key(name))}")


def _tfds(name: str, workspace: Workspace, data_dir: Path | None = None) -> None:
    with quiet_start():
        from topwork.data.tfds_mirror import prefix_of
        from topwork.data.tfds_mirror_writer import mirror_tfds

    full, found = mirror_tfds(name, workspace, data_dir)
    print(f"{'found' if found else 'mirrored'} {workspace.storage.uri_of(prefix_of(full))}/")


@contextmanager
def _workspace(storage_uri: str, state: Path | None) -> Iterator[Workspace]:
    # Nothing here is computed: a GPU is somebody else's.
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    state = state or default_state()
    progress = BarProgress() if sys.stderr.isatty() else LineProgress()
    with scratch_of(state, "mirror") as scratch, storage_at(storage_uri, state) as storage:
        yield Workspace(storage, Metrics(), progress, scratch)
