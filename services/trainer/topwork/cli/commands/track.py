"""`topwork track`: send stored runs to the services that follow them, and fetch event files for TensorBoard."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from topwork.cli.options import State
from topwork.cli.runtime.environment import configure_tracking
from topwork.cli.runtime.storage import open_storage
from topwork.cli.runtime.tensorflow_import import quiet_tensorflow_import
from topwork.clients.s3.storage import Storage
from topwork.errors import SettingError
from topwork.spec.tracking import Tracking

if TYPE_CHECKING:
    from topwork.spec import TransferJob
    from topwork.tracking.run_record import Outcome

app = typer.Typer(
    help="Send stored runs to MLflow, and fetch event files for TensorBoard.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

StorageUri = Annotated[str, typer.Argument(metavar="STORAGE", help="s3://bucket/prefix, like spec.storage.")]
# Strict, because the names become paths on this machine.
EVENT_KEY = re.compile(
    r"runs/(?P<run>[a-z0-9][a-z0-9-]*)/events/(?P<file>[a-z-]+/events\.out\.tfevents\.[0-9]+\.topwork)"
)


@app.command()
def sync(
    storage_uri: StorageUri,
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Names of runs.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="PATH=VALUE",
            help="Set a value of spec.tracking, such as spec.tracking.mlflow.uri=https://mlflow; repeatable.",
            show_default=False,
        ),
    ] = None,
    state: State = None,
) -> None:
    """Send runs to the services of spec.tracking, from storage alone: what is there already is not sent again.

    Completed stages and the evaluation are sent. The epochs of an unfinished stage are sent by the run itself.
    """
    from topwork.tracking.run_tracking import read_records, tracking_services

    if other := [override for override in overrides or () if not override.startswith("spec.tracking.")]:
        raise SettingError(f"--set {other[0]} does not concern the tracking. Only spec.tracking can be set here.")
    with open_storage(storage_uri, state) as storage:
        for run in runs:
            job = _read_job(storage, run, overrides or [])
            configure_tracking(job.spec.tracking)
            if job.spec.tracking.tensorboard:
                with quiet_tensorflow_import():  # writing event files imports it
                    pass
            services, records = tracking_services(job, storage), read_records(job, storage)
            for service in services:
                for record in records:
                    service.send(record)
            epochs = sum(len(progress.rows) for record in records for progress in record.stages.values())
            names = " and ".join(service.name for service in services)
            typer.echo(f"Sent {run} to {names}: {epochs} epochs, {_describe_end(records[-1].outcome)}")


@app.command()
def events(
    storage_uri: StorageUri,
    directory: Annotated[Path, typer.Argument(metavar="DIRECTORY", help="Target directory, the --logdir.")],
    runs: Annotated[list[str] | None, typer.Argument(metavar="RUN...", help="Names of runs [default: all].")] = None,
    state: State = None,
) -> None:
    """Download the event files of runs with spec.tracking.tensorboard to DIRECTORY/<run>/<stage>/.

    Repeat the command while a run trains: files grow in place, and a running tensorboard shows the new epochs.
    """
    with open_storage(storage_uri, state) as storage:
        prefixes = [f"runs/{run}/events/" for run in runs] if runs else ["runs/"]
        keys = [stored.key for prefix in prefixes for stored in storage.list(prefix)]
        files = [match for key in keys if (match := EVENT_KEY.fullmatch(key))]
        if missing := set(runs or ()) - {match["run"] for match in files}:
            raise SettingError(
                f"{storage.uri} has no event files of {', '.join(sorted(missing))}. Set "
                "spec.tracking.tensorboard: true, or write them with topwork track sync."
            )
        for match in files:
            if (data := storage.read(match[0])) is not None:
                _grow(directory / match["run"] / match["file"], data)
    count = f"{len(files)} event file{'' if len(files) == 1 else 's'}"
    typer.echo(f"Fetched {count} to {directory}. Show them: tensorboard --logdir {directory}")


def _read_job(storage: Storage, run: str, overrides: list[str]) -> "TransferJob":
    """Read the spec that is stored with a run."""
    from topwork.spec.loading.loader import read_bytes
    from topwork.spec.loading.overrides import parse_overrides

    key = f"runs/{run}/spec.yaml"
    if (data := storage.read(key)) is None:
        raise SettingError(f"{storage.uri} has no run {run}: {storage.uri_of(key)} does not exist. Check both names.")
    job = read_bytes(data, storage.uri_of(key), parse_overrides(overrides))[0].as_run(run)
    if job.spec.tracking == Tracking():
        raise SettingError(
            f"The spec of {run} has no spec.tracking. Name the server: --set spec.tracking.mlflow.uri=https://…"
        )
    return job


def _describe_end(outcome: "Outcome | None") -> str:
    if outcome is None:
        return "not finished"
    return f"{outcome.status.lower()}, {outcome.version.uri}" if outcome.version else outcome.status.lower()


def _grow(path: Path, data: bytes) -> None:
    """Append what a file does not have yet, so that TensorBoard continues to read it; replace it if it differs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    present = path.read_bytes() if path.exists() else b""
    if data.startswith(present):
        with path.open("ab") as file:
            file.write(data[len(present) :])
    else:
        path.unlink()
        path.write_bytes(data)
