"""`topwork run`: the whole pipeline on this machine."""

import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from topwork import __version__
from topwork.cancellation import StopSignal
from topwork.cli.options import Overrides
from topwork.cli.output.comparison import comparison
from topwork.cli.runtime.environment import default_state, quiet_start, scratch_of, serve, storage_at
from topwork.cli.runtime.shutdown import parting
from topwork.cli.runtime.signals import stopped_by_signals
from topwork.clients.prometheus.metrics import Metrics
from topwork.progress import BarProgress, LineProgress, Progress, Quiet
from topwork.spec import TransferJob
from topwork.spec.loading.loader import read_files
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
    # With replicas on the processor the GPUs are somebody else's.
    metrics = Metrics(gpus=replicas is None, only_gpus=os.environ.get("CUDA_VISIBLE_DEVICES"))
    if metrics_port is not None:
        progress.note("metrics", port=serve(metrics, metrics_port))
    published = []
    for job in jobs:
        metrics.describe(job=job.metadata.name, run=job.run, stage="run", version=__version__)
        with parting(job, metrics, progress, served=metrics_port is not None):
            published.append(_run(job, metrics, progress, state or default_state(), replicas, restart, verbose))
            for line in published[-1].summary():
                print(line, flush=True)
    for line in comparison(published):
        print(line)


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
    with scratch_of(state, job.run) as scratch, storage_at(job.spec.storage, state, metrics) as storage:
        workspace = Workspace(storage, metrics, progress, scratch, replicas, stop=stop)
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
