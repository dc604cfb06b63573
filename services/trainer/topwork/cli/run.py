"""`topwork run`: the whole pipeline on this machine."""

import fcntl
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from topwork import __version__
from topwork.cli.overrides import Overrides
from topwork.cli.signals import stopped_by_signals
from topwork.cli.surroundings import default_state, quiet_start, serve, storage_at
from topwork.edge.metrics import Metrics
from topwork.errors import SettingError
from topwork.progress import BarProgress, LineProgress, Progress, Quiet
from topwork.spec import TransferJob
from topwork.spec.reading import read_files
from topwork.stopping import StopSignal
from topwork.workspace import Workspace

if TYPE_CHECKING:
    from topwork.stages.publish import Published


class LogFormat(StrEnum):
    """How lines are written where there is no terminal."""

    text = "text"
    json = "json"


def run(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Job specs; - reads standard input.")],
    overrides: Overrides = None,
    replicas: Annotated[
        int | None, typer.Option(min=1, max=64, help="Replicas on the processor; without it all GPUs, or one device.")
    ] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Forget what earlier attempts of this run did.")] = False,
    state: Annotated[
        Path | None, typer.Option(help="Folder of scratch and embedded S3 [default: ~/.local/state/topwork].")
    ] = None,
    metrics_port: Annotated[int | None, typer.Option(min=0, max=65535, help="Serve Prometheus metrics here.")] = None,
    log_format: Annotated[LogFormat, typer.Option(help="Lines of text or of JSON, off a terminal.")] = LogFormat.text,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show what TensorFlow says, too.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show the final lines only.")] = False,
) -> None:
    """Pull, transfer, fine-tune and publish, here; a run that was begun goes on, a finished one says so."""
    jobs = [job for _, job in read_files(files, overrides or ())]
    progress = _progress(log_format, quiet)
    metrics = Metrics()
    if metrics_port is not None:
        progress.note("metrics", port=serve(metrics, metrics_port))
    for job in jobs:
        metrics.describe(job=job.metadata.name, run=job.run, version=__version__)
        published = _run(job, metrics, progress, state or default_state(), replicas, restart, verbose)
        for line in published.summary():
            print(line)
    if metrics_port is not None:
        time.sleep(max(job.spec.metrics.linger_seconds for job in jobs))


def _run(
    job: TransferJob,
    metrics: Metrics,
    progress: Progress,
    state: Path,
    replicas: int | None,
    restart: bool,
    verbose: bool,
) -> "Published":
    from topwork.stages.publish import published_earlier

    stop = StopSignal()
    with _scratch(state, job.run) as scratch, storage_at(job.spec.storage, state, metrics) as storage:
        workspace = Workspace(storage, metrics, progress, scratch, replicas, stop)
        progress.note("run", name=job.run, storage=storage.uri)
        if restart:
            storage.delete(stored.key for stored in storage.list(f"runs/{job.run}/"))
        if published := published_earlier(job, storage):
            progress.note("already published", model=published.uri)
            return published
        with stopped_by_signals(stop):
            return _run_pipeline(job, workspace, verbose)


def _run_pipeline(job: TransferJob, workspace: Workspace, verbose: bool) -> "Published":
    """Import TensorFlow and all that stands on it, without its start-up talk unless that is wanted, and run."""
    with quiet_start(verbose=verbose):
        from topwork import pipeline

    return pipeline.run(job, workspace)


def _progress(log_format: LogFormat, quiet: bool) -> Progress:
    if quiet:
        return Quiet()
    if sys.stderr.isatty():
        return BarProgress()
    return LineProgress(as_json=log_format is LogFormat.json)


@contextmanager
def _scratch(state: Path, run: str) -> Iterator[Path]:
    """Scratch of a run, for this process alone; kept after a failure, since a checkpoint's data may be in it."""
    scratch = state / "scratch" / run
    scratch.mkdir(parents=True, exist_ok=True)
    with (state / "scratch" / f"{run}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise SettingError(f"{run} is being run by another process on this machine. Wait for it to end.") from error
        yield scratch
        shutil.rmtree(scratch, ignore_errors=True)
