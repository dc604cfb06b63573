"""`topwork run`: run jobs on this machine."""

import logging
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import structlog
import typer

from topwork import __version__
from topwork.cancellation import StopRequest
from topwork.cli.options import LogFormatOption, MetricsPort, Overrides, Quiet, Replicas, State, serve_metrics
from topwork.cli.output.comparison import format_comparison
from topwork.cli.output.progress import NoProgress, open_progress
from topwork.cli.runtime.environment import configure_tracking, default_state_directory, visible_gpus
from topwork.cli.runtime.local_nodes import LocalNodes, open_local_nodes
from topwork.cli.runtime.logging import LogFormat, configure_logging, is_verbose, set_log_level
from topwork.cli.runtime.shutdown import record_outcome
from topwork.cli.runtime.signals import stop_on_signals
from topwork.cli.runtime.storage import lock_scratch, open_storage
from topwork.cli.runtime.tensorflow_import import quiet_tensorflow_import
from topwork.clients.prometheus.metrics import Metrics
from topwork.errors import UnavailableError
from topwork.progress import Progress
from topwork.spec import TransferJob
from topwork.spec.loading.loader import read_files
from topwork.workspace import Workspace

if TYPE_CHECKING:
    from topwork.registry.cross_validation import CrossValidation
    from topwork.stages.publish import Published
    from topwork.stages.validate import Validated

log = structlog.get_logger(__name__)


def run(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Job specs; - reads standard input.")],
    overrides: Overrides = None,
    replicas: Replicas = None,
    nodes: Annotated[
        int,
        typer.Option(min=1, max=64, help="Train in this many processes, which divide the GPUs and act as nodes."),
    ] = 1,
    restart: Annotated[
        bool,
        typer.Option("--restart", help="Delete the results of this run first, also those that it shares with others."),
    ] = False,
    pinned: Annotated[
        bool, typer.Option("--pinned", help="Use the dataset of the latest version, even if its source has changed.")
    ] = False,
    state: State = None,
    metrics_port: MetricsPort = None,
    log_format: LogFormatOption = LogFormat.text,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Log debug messages and the output of TensorFlow, too.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Run jobs on this machine: pull, transfer, fine-tune, publish.

    An interrupted run resumes, and a finished one is skipped. Stages with the same settings and data are shared by all
    runs. The source is checked each time: if images were added, changed or removed, the job trains a new run on them.
    """
    state = state or default_state_directory()
    local_nodes = open_local_nodes(nodes, replicas, state, visible_gpus()) if nodes > 1 else None
    jobs = [job for _, job in read_files(files, [*(overrides or ()), *(local_nodes.overrides if local_nodes else ())])]
    progress = _configure_output(log_format, quiet=quiet, verbose=verbose)
    # With replicas on the CPU, other processes use the GPUs.
    metrics = Metrics(gpus=replicas is None, visible_devices=visible_gpus())
    if metrics_port is not None:
        log.info("metrics", port=serve_metrics(metrics, metrics_port))
    runner = _Runner(metrics, progress, state, replicas, local_nodes, restart, pinned, verbose or is_verbose())
    outcomes = []
    for job in jobs:
        # The run is named after the check of its source. An empty label is none.
        metrics.start_job(job=job.metadata.name, run="", stage="run", version=__version__)
        with record_outcome(job, metrics, served=metrics_port is not None):
            outcomes.append(runner.run(job))
            for line in outcomes[-1].summary():
                print(line, flush=True)
    for line in format_comparison(outcomes):
        print(line)


def _configure_output(log_format: LogFormat, *, quiet: bool, verbose: bool) -> Progress:
    if log_format is LogFormat.json:
        configure_logging(log_format)
    if verbose:
        set_log_level(logging.DEBUG)
    if quiet:
        set_log_level(logging.CRITICAL)
        return NoProgress()
    return open_progress()


@dataclass(frozen=True)
class _Runner:
    """Runs jobs one after the other, with the same options.

    Attributes:
        metrics: Metrics of the process.
        progress: Progress display.
        state: State directory.
        replicas: Replicas on the CPU; None for one per GPU, or one without GPUs.
        nodes: Nodes that train; None for this process.
        restart: Whether to delete the results of the run first.
        pinned: Whether to keep the dataset that was used before.
        verbose: Whether to show the output of TensorFlow.
    """

    metrics: Metrics
    progress: Progress
    state: Path
    replicas: int | None
    nodes: LocalNodes | None
    restart: bool
    pinned: bool
    verbose: bool

    def run(self, job: TransferJob) -> "Published | Validated | CrossValidation":
        stop = StopRequest()
        with open_storage(job.spec.storage, self.state, self.metrics) as storage, stop_on_signals(stop):
            workspace = Workspace(storage, self.metrics, self.progress, self.state, self.replicas, stop=stop)
            job, workspace = self._select_dataset(job, workspace)
            with lock_scratch(self.state, job.run) as scratch:
                return self._run(job, replace(workspace, scratch=scratch))

    def _select_dataset(self, job: TransferJob, workspace: Workspace) -> tuple[TransferJob, Workspace]:
        """Check the source, and name the run by the dataset and everything else that its weights depend on."""
        from topwork.registry.datasets import select_dataset
        from topwork.registry.stage_keys import name_run

        with tempfile.TemporaryDirectory(prefix="topwork-") as scratch:
            selected = select_dataset(job, replace(workspace, scratch=Path(scratch)), pinned=self.pinned)
        if selected is None:
            return job, workspace
        if selected.changes:
            log.warning("source changed", changes=selected.changes, hint="--pinned keeps the previous dataset")
        job = name_run(job, selected.fingerprint, workspace.storage)
        return job, replace(workspace, dataset=selected.stored.prefix if selected.stored else "")

    def _run(self, job: TransferJob, workspace: Workspace) -> "Published | Validated | CrossValidation":
        from topwork.registry.completion import restore_metrics
        from topwork.registry.runs import delete_results
        from topwork.stages.publish import find_outcome
        from topwork.stages.pull import find_pulled_dataset

        self.metrics.start_job(job=job.metadata.name, run=job.run, stage="run", version=__version__)
        log.info("run", name=job.run, storage=workspace.storage.uri)
        dataset = find_pulled_dataset(job, workspace)
        if self.restart:
            delete_results(job, dataset, workspace.storage)
        if dataset and (outcome := find_outcome(job, dataset, workspace)):
            return outcome
        with quiet_tensorflow_import(verbose=self.verbose):
            from topwork import pipeline
            from topwork.tracking.run_tracking import track_run

        if self.nodes is None:
            configure_tracking(job.spec.tracking)
            # On several nodes, the others than the chief return the classifier.
            with track_run(job, workspace) as tracked:
                return cast("Published | Validated | CrossValidation", pipeline.run(job, tracked))
        dataset = pipeline.run_pull(job, workspace)
        self.nodes.train(job, dataset.prefix, workspace.scratch)
        outcome = find_outcome(job, dataset, workspace)
        if outcome is None:
            raise UnavailableError("The result of the run disappeared. Start the same job again.")
        # This process is the last one to push its metrics.
        restore_metrics(job, dataset, workspace)
        return outcome
