"""`topwork stage`: run one stage of a job in a container of its pod."""

import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import structlog
import typer

from topwork import __version__
from topwork.cancellation import STOPPED_MESSAGE, StopInterrupt, StopRequest
from topwork.cli.runtime.container import Container
from topwork.cli.runtime.environment import (
    configure_tracking,
    hide_gpus,
    read_grace_seconds,
    read_node,
    read_pod_settings,
    visible_gpus,
)
from topwork.cli.runtime.signals import start_stop_watchdog, stop_on_signals
from topwork.cluster.names import JOB_DIRECTORY, JOB_FILE, METRICS_PORTS, SCRATCH_DIRECTORY, STAGES, StageName
from topwork.errors import SettingError, TopworkError
from topwork.nodes.group import NodeGroup

if TYPE_CHECKING:
    from topwork.clients.prometheus.metrics import Metrics
    from topwork.data.dataset_manifest import StoredDataset
    from topwork.registry.cross_validation import CrossValidation
    from topwork.registry.stage_results import Classifier
    from topwork.spec import TransferJob
    from topwork.stages.publish import Published
    from topwork.stages.validate import Validated
    from topwork.workspace import Workspace

log = structlog.get_logger(__name__)

RESTART_POLL_SECONDS = 5.0
# Time from the signal to the end of the process if nothing has to be stored first.
STOP_SECONDS = 5.0
GRACE_PERIOD_EXCEEDED = (
    "Stopped before the last checkpoint was stored: the current step and its upload took longer than the grace period "
    "of {grace:g} s allows. Earlier checkpoints are kept: start the same job again to resume from the last one, and "
    "raise spec.compute.terminationGracePeriodSeconds if this happens again."
)


def stage(
    name: Annotated[StageName, typer.Argument(metavar="STAGE", help="pull, transfer or fine-tune.")],
    job: Annotated[Path, typer.Option(help="Job spec with exactly one job.")] = Path(JOB_DIRECTORY) / JOB_FILE,
    scratch: Annotated[Path, typer.Option(help="Directory that the stages share; its contents may be lost.")] = Path(
        SCRATCH_DIRECTORY
    ),
    metrics_port: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=65535,
            help="Serve Prometheus metrics on this port [default: 9101 pull, 9102 transfer, 9103 fine-tune].",
            show_default=False,
        ),
    ] = None,
    termination_log: Annotated[Path, typer.Option(hidden=True)] = Path("/dev/termination-log"),
) -> None:
    """Run one stage of a job in its container; fine-tune also publishes.

    A stage that is already complete is skipped.
    """
    stop = StopRequest()
    container = Container(name, termination_log)
    try:
        grace = read_grace_seconds()
        with stop_on_signals(stop, ignore_repeats=grace is not None):

            def exit_after_timeout() -> None:
                container.exit_after_timeout(
                    GRACE_PERIOD_EXCEEDED.format(grace=grace) if stop.is_deferred() else STOPPED_MESSAGE
                )

            start_stop_watchdog(stop, STOP_SECONDS, exit_after_timeout, grace_seconds=grace)
            port = METRICS_PORTS[name] if metrics_port is None else metrics_port
            wait_for_scrape = _run(container, job, scratch, port, stop)
            # The stage is complete: a stop only ends the wait for the last scrape.
            with suppress(StopInterrupt):
                container.publish_outcome(wait_for_scrape=wait_for_scrape)
    except BaseException as error:
        code = container.report_failure(error)
        container.publish_outcome(wait_for_scrape=True)
        container.exit(code)
    container.exit(0)


def _run(container: Container, file: Path, scratch: Path, port: int, stop: StopRequest) -> bool:
    """Run the stage and report its outcome.

    Returns:
        Whether to wait for a last scrape. Later stages repeat the metrics of the earlier ones, so only the last waits.
    """
    from topwork.cli.options import serve_metrics
    from topwork.clients.prometheus.metrics import Metrics

    pod, node = read_pod_settings(), read_node()
    container.nodes = NodeGroup(node)
    job = _read_job(file)
    job = job.as_run(pod.run) if pod.run else job
    container.run, container.job = job.run, job
    container.metrics = metrics = Metrics(gpus=_owns_gpus(container, job), visible_devices=visible_gpus())
    metrics.start_job(
        job=job.metadata.name,
        run=job.run,
        stage=container.stage,
        version=__version__,
        node=node.index,
        nodes=node.count,
    )
    log.info("metrics", port=serve_metrics(metrics, port))
    _serve_ports_of_earlier_stages(container.stage, port)
    workspace = replace(
        _open_workspace(job, metrics, scratch, stop),
        dataset=pod.dataset,
        attempt=pod.attempt,
        nodes=container.nodes,
    )
    log.info("run", name=job.run, stage=container.stage, storage=workspace.storage.uri)
    if pod.attempt:
        container.eviction_error = partial(_eviction_error, scratch, workspace)
    if pod.restart:
        _restart_once(job, workspace)
    result = _find_result(container, job, workspace, pod.selected_run)
    if result is not None:
        _report_success(container, result, workspace)
        return False
    _report_success(container, _run_stage(container, job, workspace), workspace)
    return container.stage == "fine-tune"


def _read_job(file: Path) -> "TransferJob":
    from topwork.spec.loading.loader import read_jobs

    jobs = read_jobs(file)
    if len(jobs) > 1:
        names = ", ".join(job.metadata.name for job in jobs)
        raise SettingError(
            f"{file} contains {len(jobs)} jobs ({names}), but a pod runs exactly one. Put each job in its own file."
        )
    return jobs[0]


def _owns_gpus(container: Container, job: "TransferJob") -> bool:
    """Whether visible GPUs belong to this container: some container runtimes show all GPUs to every container."""
    return container.stage != "pull" and job.spec.compute.gpus > 0


def _serve_ports_of_earlier_stages(stage: StageName, port: int) -> None:
    """Serve an empty page on the metrics ports of the earlier containers, which have the same pod IP.

    Prometheus keeps scraping them after they have ended, and an alert on targets that are down would fire in every
    long stage.
    """
    from topwork.clients.prometheus.metrics import serve_empty_page

    if port == METRICS_PORTS[stage]:
        for earlier in STAGES[: STAGES.index(stage)]:
            with suppress(OSError):
                serve_empty_page(METRICS_PORTS[earlier])


def _open_workspace(job: "TransferJob", metrics: "Metrics", scratch: Path, stop: StopRequest) -> "Workspace":
    from topwork.cli.output.progress import NoProgress
    from topwork.cli.runtime.environment import trust_extra_ca, validate_aws_variables
    from topwork.cli.runtime.storage import open_pod_storage
    from topwork.spec.kubernetes_types import quantity_to_bytes
    from topwork.workspace import Workspace

    directory = _create_scratch(scratch / job.run)
    validate_aws_variables()
    trust_extra_ca(directory)
    storage = open_pod_storage(job.spec.storage, metrics)
    limit = int(quantity_to_bytes(job.spec.compute.scratch))
    return Workspace(storage, metrics, NoProgress(), directory, scratch_limit=limit, stop=stop)


def _create_scratch(directory: Path) -> Path:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingError(
            f"Cannot create the scratch directory {directory} ({error.strerror}). Mount a volume that this user can "
            "write to, or choose another directory with --scratch."
        ) from error
    return directory


def _eviction_error(scratch: Path, workspace: "Workspace") -> TopworkError | None:
    from topwork.cli.runtime.eviction import eviction_error

    elapsed = workspace.stop.seconds_since_request()
    if elapsed is None or workspace.scratch_limit is None:
        return None
    return eviction_error(scratch, workspace.scratch_limit, elapsed)


def _restart_once(job: "TransferJob", workspace: "Workspace") -> None:
    """Delete the results of the run, in the first container of the Job only: its other pods resume."""
    from topwork.registry.runs import delete_results
    from topwork.stages.pull import find_pulled_dataset

    marker = f"runs/{job.run}/restart-{workspace.attempt}.json"
    if not workspace.nodes.is_chief:
        # Earlier results must not be taken for those of this Job.
        while workspace.storage.size(marker) is None:
            log.info("waiting for node 0 to delete the results of the run")
            time.sleep(RESTART_POLL_SECONDS)
    elif workspace.storage.size(marker) is None:
        delete_results(job, find_pulled_dataset(job, workspace), workspace.storage)
        workspace.storage.write(marker, b'{"format": 1}', content_type="application/json")


def _find_result(
    container: Container, job: "TransferJob", workspace: "Workspace", selected_run: str
) -> "StoredDataset | Classifier | Published | Validated | CrossValidation | None":
    """Find the result of an earlier attempt and restore its metrics, without importing TensorFlow."""
    from topwork.registry.completion import training_stage_keys
    from topwork.registry.selected_run import require_same_training
    from topwork.registry.stage_keys import stage_keys
    from topwork.registry.stage_results import find_completed_stage
    from topwork.stages.publish import find_outcome
    from topwork.stages.pull import find_pulled_dataset

    if container.stage == "pull" and not workspace.nodes.is_chief:
        return None
    dataset = find_pulled_dataset(job, workspace)
    if dataset is None:
        return None
    if outcome := find_outcome(job, dataset, workspace):
        for run, stage, key in training_stage_keys(job, "fine-tune", dataset, workspace.storage):
            find_completed_stage(run, stage, key, workspace)
        return outcome
    if selected_run:
        require_same_training(job, selected_run, dataset, workspace.storage)
    if container.stage == "pull":
        return dataset
    if container.stage != "transfer" or job.spec.dataset.folds:
        return None
    keys = stage_keys(job, dataset.metadata.fingerprint, workspace.storage, dataset.inputs)
    return find_completed_stage(job.run, "transfer", keys.transfer, workspace)


def _run_stage(
    container: Container, job: "TransferJob", workspace: "Workspace"
) -> "StoredDataset | Classifier | Published | Validated | CrossValidation":
    if container.stage == "pull":
        return _pull(container, job, workspace)
    if workspace.nodes.count == 1:
        return _train(container, job, workspace)
    from topwork.cli.runtime.node_group import train_on_nodes

    return train_on_nodes(
        container, job, workspace, pull=partial(_pull, container, job), train=partial(_train, container, job)
    )


def _pull(container: Container, job: "TransferJob", workspace: "Workspace") -> "StoredDataset":
    if not workspace.nodes.is_chief:
        from topwork.stages.pull import wait_for_dataset

        return wait_for_dataset(job, workspace)
    _import_tensorflow(container, job)
    from topwork import pipeline

    return pipeline.run_pull(job, workspace)


def _train(
    container: Container, job: "TransferJob", workspace: "Workspace"
) -> "Classifier | Published | Validated | CrossValidation":
    _import_tensorflow(container, job)
    from topwork import pipeline
    from topwork.tracking.run_tracking import track_run
    from topwork.training.distribution.strategy import choose_pod_replicas

    configure_tracking(job.spec.tracking)
    workspace = replace(workspace, replicas=choose_pod_replicas(job.spec.compute.gpus, visible_gpus()))
    is_last_stage = container.stage == "fine-tune"
    with track_run(job, workspace, is_last_stage=is_last_stage) as tracked:
        return pipeline.run(job, tracked) if is_last_stage else pipeline.run_transfer(job, tracked)


def _import_tensorflow(container: Container, job: "TransferJob") -> None:
    from topwork.cli.runtime.tensorflow_import import quiet_tensorflow_import

    if not _owns_gpus(container, job):
        hide_gpus()
    with quiet_tensorflow_import():
        from topwork import pipeline  # noqa: F401
        from topwork.training.distribution import strategy  # noqa: F401


def _report_success(
    container: Container,
    result: "StoredDataset | Classifier | Published | Validated | CrossValidation",
    workspace: "Workspace",
) -> None:
    from topwork.data.dataset_manifest import StoredDataset
    from topwork.registry.cross_validation import CrossValidation
    from topwork.registry.stage_results import Classifier
    from topwork.stages.validate import Validated

    if isinstance(result, StoredDataset):
        container.report_success(dataset=workspace.storage.uri_of(result.prefix), images=result.metadata.images)
    elif isinstance(result, Classifier):
        container.report_success(
            epochs=len(result.rows),
            best_epoch=result.best_epoch,
            weights_from=str(result.kept),
            weights=workspace.storage.uri_of(result.key),
        )
    elif isinstance(result, Validated):
        container.report_success(
            metric=next(iter(result.metrics.items())),
            metrics=result.metrics,
            images_of=result.dataset,
            weights_from=str(result.weights),
            weights=result.classifier_uri,
            images=result.images,
        )
    elif isinstance(result, CrossValidation):
        container.report_success(
            metric=next(iter(result.metrics.items())) if container.stage == "fine-tune" else None,
            metrics=None,
            images_of=None,
            model=None,
            weights_from=None,
            folds=len(result.folds),
            report=result.report_uri,
            images=result.images,
            **result.metrics,
        )
    else:
        container.report_success(
            metric=next(iter(result.metrics.items())) if container.stage == "fine-tune" else None,
            metrics=None,
            images_of=None,
            model=result.uri,
            weights_from=str(result.weights) if result.weights else None,
            report=result.report_uri,
            split=result.split,
            images=result.images,
            **result.metrics,
        )
