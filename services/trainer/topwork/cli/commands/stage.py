"""`topwork stage`: one stage of a job, as the containers of its pod call it."""

import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from topwork import __version__
from topwork.cancellation import STOPPED, StopNow, StopSignal
from topwork.cli.runtime.container import Container
from topwork.cli.runtime.signals import end_overdue, stopped_by_signals
from topwork.cluster.names import JOB_FILE, JOB_FOLDER, METRICS_PORTS, SCRATCH, STAGES, StageName
from topwork.errors import SettingError

if TYPE_CHECKING:
    from topwork.data.dataset_manifest import StoredDataset
    from topwork.registry.stage_results import Classifier
    from topwork.spec import TransferJob
    from topwork.stages.publish import Published
    from topwork.workspace import Workspace

# From the signal to the end of the process where nothing has to be stored first.
STOP_SECONDS = 5.0
GRACE = "TOPWORK_GRACE_SECONDS"
LATE = (
    "Stopped before the last checkpoint was stored: the step under way and its upload took longer than a grace period "
    "of {grace:g} s leaves. What was stored before is kept: start the same job again to go on from there, and raise "
    "spec.compute.terminationGracePeriodSeconds if this happens again."
)


def stage(
    name: Annotated[StageName, typer.Argument(metavar="STAGE", help="pull, transfer or fine-tune.")],
    job: Annotated[Path, typer.Option(help="Job spec; it holds one job.")] = Path(JOB_FOLDER) / JOB_FILE,
    scratch: Annotated[Path, typer.Option(help="Folder that the stages share, and may lose.")] = Path(SCRATCH),
    metrics_port: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=65535,
            help="Serve Prometheus metrics here [default: 9101 pull, 9102 transfer, 9103 fine-tune].",
            show_default=False,
        ),
    ] = None,
    termination_log: Annotated[Path, typer.Option(hidden=True)] = Path("/dev/termination-log"),
) -> None:
    """Run one stage of a job in its container; fine-tune publishes, too. What is done already is found in storage."""
    stop = StopSignal()
    container = Container(name, termination_log)
    try:
        grace = _grace_seconds()
        with stopped_by_signals(stop, patient=grace is not None):

            def end() -> None:
                container.overdue(LATE.format(grace=grace) if stop.is_held() else STOPPED)

            end_overdue(stop, STOP_SECONDS, end, grace_seconds=grace)
            port = METRICS_PORTS[name] if metrics_port is None else metrics_port
            lingers = _run(container, job, scratch, port, stop)
            # Who waits for a last scrape has nothing to lose.
            with suppress(StopNow):
                container.part(lingers=lingers)
    except BaseException as error:
        code = container.failed(error)
        container.part(lingers=True)
        container.leave(code)
    container.leave(0)


def _run(container: Container, file: Path, scratch: Path, port: int, stop: StopSignal) -> bool:
    """Run the stage and tell how it ended; says whether a last scrape is worth waiting for: later stages repeat it."""
    from topwork.cli.runtime.environment import serve
    from topwork.cli.runtime.pod_environment import check_variables, pod_storage, trust_extra_authority
    from topwork.clients.prometheus.metrics import Metrics
    from topwork.spec.compute import in_bytes
    from topwork.workspace import Workspace

    job = _only_job(file)
    container.run, container.job = job.run, job
    container.metrics = metrics = Metrics(
        gpus=_has_gpus(container, job), only_gpus=os.environ.get("CUDA_VISIBLE_DEVICES")
    )
    metrics.describe(job=job.metadata.name, run=job.run, stage=container.stage, version=__version__)
    container.log.note("metrics", port=serve(metrics, port))
    _stand_in_for_earlier_stages(container.stage, port)
    folder = _writable(scratch / job.run)
    check_variables()
    trust_extra_authority(folder)
    storage = pod_storage(job.spec.storage, metrics)
    container.log.note("run", name=job.run, stage=container.stage, storage=storage.uri)
    limit = int(in_bytes(job.spec.compute.scratch))
    workspace = Workspace(storage, metrics, container.log, folder, scratch_limit=limit, stop=stop)
    if _found(container, job, workspace):
        return False
    _work(container, job, workspace)
    return container.stage == "fine-tune"


def _stand_in_for_earlier_stages(stage: StageName, port: int) -> None:
    """Answer on the ports of the containers before, which share the pod's address.

    Prometheus still knows them as targets when they are over, and an alert on targets that are down would fire in every
    long stage.
    """
    from topwork.clients.prometheus.metrics import serve_nothing

    if port == METRICS_PORTS[stage]:
        for earlier in STAGES[: STAGES.index(stage)]:
            with suppress(OSError):
                serve_nothing(METRICS_PORTS[earlier])


def _grace_seconds() -> float | None:
    """Read how long the pod has from SIGTERM to SIGKILL; None where nobody says."""
    text = os.environ.get(GRACE)
    try:
        return float(text) if text else None
    except ValueError:
        raise SettingError(f"{GRACE} is {text!r}: expected seconds, such as 300.") from None


def _only_job(file: Path) -> "TransferJob":
    from topwork.spec.loading.loader import read_jobs

    jobs = read_jobs(file)
    if len(jobs) > 1:
        names = ", ".join(job.metadata.name for job in jobs)
        raise SettingError(f"{file} holds {len(jobs)} jobs ({names}), and a pod runs one. Give each a file of its own.")
    return jobs[0]


def _writable(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingError(
            f"The scratch folder {folder} can't be made ({error.strerror}). Mount a volume that this user may write "
            "to, or name another folder with --scratch."
        ) from error
    return folder


def _has_gpus(container: Container, job: "TransferJob") -> bool:
    """Whether the GPUs that are seen are its own: a node's runtime may show all of them to every container."""
    return container.stage != "pull" and job.spec.compute.gpus > 0


def _found(container: Container, job: "TransferJob", workspace: "Workspace") -> bool:
    """Tell what earlier attempts have done already, without importing TensorFlow."""
    from topwork.registry.stage_results import read_done, repeat
    from topwork.stages.publish import published_earlier
    from topwork.stages.pull import pulled_earlier

    if published := published_earlier(job, workspace.storage):
        container.log.note("already published", model=published.uri)
        for earlier in ("transfer", "fine-tune"):
            if classifier := read_done(workspace.storage, job.run, earlier):
                repeat(classifier, workspace.metrics)
        published.repeat(workspace.metrics)
        _tell(container, published, workspace)
    elif container.stage == "pull" and (dataset := pulled_earlier(job, workspace)):
        _tell(container, dataset, workspace)
    elif container.stage == "transfer" and (classifier := read_done(workspace.storage, job.run, "transfer")):
        container.log.note("already done", stage="transfer")
        repeat(classifier, workspace.metrics)
        _tell(container, classifier, workspace)
    else:
        return False
    return True


def _work(container: Container, job: "TransferJob", workspace: "Workspace") -> None:
    from topwork.cli.runtime.environment import quiet_start

    if not _has_gpus(container, job):
        os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    with quiet_start():
        from topwork import pipeline
        from topwork.training.strategy import replicas_in_pod

    if container.stage == "pull":
        return _tell(container, pipeline.run_pull(job, workspace), workspace)
    workspace = replace(workspace, replicas=replicas_in_pod(job.spec.compute.gpus, container.log))
    if container.stage == "transfer":
        return _tell(container, pipeline.run_transfer(job, workspace), workspace)
    return _tell(container, pipeline.run(job, workspace), workspace)


def _tell(container: Container, made: "StoredDataset | Classifier | Published", workspace: "Workspace") -> None:
    from topwork.data.dataset_manifest import StoredDataset
    from topwork.registry.stage_results import Classifier

    if isinstance(made, StoredDataset):
        container.done(dataset=workspace.storage.uri_of(made.prefix), images=made.facts.images)
    elif isinstance(made, Classifier):
        container.done(epochs=len(made.rows), best_epoch=made.best_epoch, weights=workspace.storage.uri_of(made.key))
    else:
        main = next(iter(made.metrics.items())) if container.stage == "fine-tune" else None
        container.done(
            metric=main,
            model=made.uri,
            report=made.report_uri,
            split=made.split,
            images=made.images,
            **made.metrics,
        )
