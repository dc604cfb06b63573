"""Running TransferJobs from Python: in notebooks, and in pipelines such as Airflow or Argo Workflows.

The functions need a cluster with the controller of topwork. They connect as kubectl does, with $KUBECONFIG or
~/.kube/config, and in a pod with its service account. TensorFlow is not imported.

Example:
    >>> from topwork.client import apply, wait
    >>> applied = apply("examples/cats-vs-dogs.yaml", namespace="vision")
    >>> wait(applied.name, namespace="vision", timeout_seconds=6 * 3600).model
    's3://ml-artifacts/topwork/models/cats-vs-dogs/4/'
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from topwork.clients.kubernetes import KubernetesObject
from topwork.clients.kubernetes.cluster import Cluster, ClusterSettings, connect
from topwork.clients.kubernetes.errors import NotFoundError
from topwork.cluster.manifests.render import RenderOptions
from topwork.cluster.manifests.transfer_job import build_transfer_job, parse_transfer_job
from topwork.cluster.names import RunKind
from topwork.cluster.operations.cancel import TransferJobCancellation
from topwork.cluster.operations.namespace_defaults import DefaultsByNamespace
from topwork.cluster.operations.submit_transfer_job import Outcome, TransferJobSubmission, build_object
from topwork.cluster.operations.transfer_jobs import (
    POLL_SECONDS,
    choose_run_kind,
    require_transfer_job,
    watch_transfer_job,
)
from topwork.cluster.status.transfer_job_run import is_final, read_transfer_job_run, read_transfer_job_status
from topwork.cluster.transfer_job_status import TransferJobStatus
from topwork.errors import SettingError, Stopped, TopworkError, UnavailableError
from topwork.spec import TransferJob
from topwork.spec.loading.loader import read_files

__all__ = [
    "Applied",
    "JobCanceledError",
    "JobFailedError",
    "TransferJob",
    "TransferJobStatus",
    "apply",
    "cancel",
    "status",
    "wait",
]

OUTAGE_SECONDS = 1800.0
"""How long the API server may be unavailable while `wait` waits, such as during an upgrade."""
RETRY_SECONDS = 5.0


class JobFailedError(TopworkError):
    """The run of a TransferJob failed.

    Attributes:
        name: Name of the TransferJob.
        status: Its final status.
        exit_code: Exit code of the run: 2 the spec, the data or a setting is wrong; 3 a gate was not met; 75 storage or
            the network failed, or the deadline was exceeded; 143 the run was canceled.
        error: Why it failed.
    """

    def __init__(self, name: str, status: TransferJobStatus, exit_code: int, error: str) -> None:
        super().__init__(f"transferjob/{name} ended with exit code {exit_code}: {error}")
        self.name, self.status, self.exit_code, self.error = name, status, exit_code, error


class JobCanceledError(JobFailedError):
    """The run of a TransferJob was canceled, or the TransferJob was deleted."""


@dataclass(frozen=True)
class Applied:
    """A TransferJob that was applied.

    Attributes:
        name: Its name, for the other functions.
        namespace: Its namespace.
        run: Name of its run.
        outcome: `submitted` if it is new, `replaced` if it replaces a failed, canceled or complete one, `changed`,
            `unchanged` if the same run is not finished, or `complete` if the same run is complete.
    """

    name: str
    namespace: str
    run: str
    outcome: Outcome


def apply(  # noqa: PLR0913 - keyword-only options
    job: str | Path | Mapping[str, Any] | TransferJob,
    *,
    namespace: str | None = None,
    context: str | None = None,
    kubeconfig: str | Path | None = None,
    overrides: Sequence[str] = (),
    image: str | None = None,
    restart: bool = False,
    rerun: bool = False,
) -> Applied:
    """Run a job in the cluster, as `topwork submit` does; returns without waiting for the run.

    A run that is pending, running or complete is left unchanged, and a failed or canceled one resumes. If the spec of
    an unfinished TransferJob has changed, the controller stops its run with a checkpoint and starts the new one.

    Args:
        job: A YAML file with one job, its content as a mapping, or a model of the spec.
        namespace: Namespace; None for that of the spec, of the context or of the pod.
        context: Context of the kubeconfig; None for the current one.
        kubeconfig: kubeconfig file; None for $KUBECONFIG, ~/.kube/config, or the service account of the pod.
        overrides: `PATH=VALUE` items that change values of a file, as `--set` does.
        image: Image of all containers; None for that of the spec or of the namespace.
        restart: Whether to delete the results of the run first. A run that is not finished is rejected.
        rerun: Whether to start a complete run again, such as for a source that grows: its pods check the source, and
            stages whose inputs are the same are skipped.

    Returns:
        Name, namespace and run of the TransferJob.

    Raises:
        InvalidSpecError: With all problems of the spec.
        SettingError: If there is no cluster or no controller, or if the cluster rejects the TransferJob.
        UnavailableError: If the API server does not respond.

    Example:
        >>> apply("job.yaml", overrides=["spec.transfer.epochs=2"], namespace="vision").run
        'cats-vs-dogs-5d41402a'
    """
    cluster = _connect(namespace, context, kubeconfig)
    choose_run_kind(cluster, RunKind.transferjob)
    defaults = DefaultsByNamespace(cluster, namespace)
    model = _read_job(job, overrides, defaults)
    own = model.metadata.namespace
    if own and namespace and own != namespace:
        raise SettingError(f"metadata.namespace is {own}, but namespace is {namespace}. Remove one of them.")
    if own:
        cluster = cluster.in_namespace(own)
    obj = build_object(model, RenderOptions(image, cluster.namespace), defaults.filled_paths(overrides, [model])[-1])
    found = defaults.of(own)
    submission = TransferJobSubmission(cluster, obj, model.run, _ignore, defaults=found.spec if found else None)
    outcome = submission.submit(restart=restart, rerun=rerun)
    return Applied(model.metadata.name, cluster.namespace, model.run, outcome)


def status(
    name: str, *, namespace: str | None = None, context: str | None = None, kubeconfig: str | Path | None = None
) -> TransferJobStatus:
    """Read the status of a TransferJob.

    Args:
        name: Name of the TransferJob.
        namespace: Namespace; None for that of the context or of the pod.
        context: As in `apply`.
        kubeconfig: As in `apply`.

    Returns:
        Its status. `observed_generation` is 0 until the controller has processed it.

    Raises:
        SettingError: If there is no such TransferJob, or the cluster rejects the request.
        UnavailableError: If the API server does not respond.
    """
    return read_transfer_job_status(require_transfer_job(_connect(namespace, context, kubeconfig), name))


def wait(
    name: str,
    *,
    timeout_seconds: float,
    on_change: Callable[[TransferJobStatus], None] | None = None,
    namespace: str | None = None,
    context: str | None = None,
    kubeconfig: str | Path | None = None,
) -> TransferJobStatus:
    """Wait until the run of a TransferJob is complete. The run continues if this function ends earlier.

    Args:
        name: Name of the TransferJob.
        timeout_seconds: How long to wait, in seconds.
        on_change: Called with the status at the start and after each change.
        namespace: As in `status`.
        context: As in `apply`.
        kubeconfig: As in `apply`.

    Returns:
        The final status, with `model` and `model_version`.

    Raises:
        JobFailedError: If the run failed, or the spec is not accepted.
        JobCanceledError: If the run was canceled, or the TransferJob is deleted.
        TimeoutError: If the run is not finished in time.
        SettingError: If there is no such TransferJob, or the cluster rejects a request.
        UnavailableError: If the API server does not respond for half an hour.
    """
    cluster = _connect(namespace, context, kubeconfig)
    deadline = time.monotonic() + timeout_seconds
    current, previous = read_transfer_job_status(require_transfer_job(cluster, name)), None
    try:
        for obj in _watch(cluster, name, poll_seconds=min(POLL_SECONDS, timeout_seconds)):
            current = read_transfer_job_status(obj)
            if on_change and current != previous:
                on_change(current)
            previous = current
            if is_final(obj):
                return _require_complete(name, obj)
            if time.monotonic() >= deadline:
                raise TimeoutError(
                    f"transferjob/{name} is not finished after {timeout_seconds:.0f} s: "
                    f"{read_transfer_job_run(obj).reason or current.state}. The run continues."
                )
    except NotFoundError as error:
        raise JobCanceledError(name, current, Stopped.exit_code, "the TransferJob was deleted") from error
    raise AssertionError("a TransferJob is watched until its run is finished")


def cancel(
    name: str,
    *,
    namespace: str | None = None,
    context: str | None = None,
    kubeconfig: str | Path | None = None,
    now: bool = False,
) -> None:
    """Stop the run of a TransferJob with a checkpoint, and wait until its pods are gone.

    A run that is finished is left unchanged. `apply` with the same spec resumes a canceled one.

    Args:
        name: Name of the TransferJob.
        namespace: As in `status`.
        context: As in `apply`.
        kubeconfig: As in `apply`.
        now: Whether to kill the pods immediately: progress since the last checkpoint is lost.

    Raises:
        SettingError: If there is no such TransferJob, it has no run, or the cluster rejects a request.
        UnavailableError: If a pod does not end in time, or the API server or the controller does not respond.
    """
    cluster = _connect(namespace, context, kubeconfig)
    obj = require_transfer_job(cluster, name)
    run = read_transfer_job_status(obj).run
    if is_final(obj):
        return
    if not run:
        raise SettingError(f"transferjob/{name} in namespace {cluster.namespace} has no run to cancel.")
    TransferJobCancellation(cluster, run, now, _ignore, uid=obj["metadata"]["uid"], name=name).cancel()


def _connect(namespace: str | None, context: str | None, kubeconfig: str | Path | None) -> Cluster:
    settings = ClusterSettings(
        namespace,
        context,
        str(kubeconfig) if kubeconfig else None,
        default_kubeconfig=os.environ.get("KUBECONFIG"),
        in_pod=bool(os.environ.get("KUBERNETES_SERVICE_HOST")),
    )
    return connect(settings)


def _read_job(
    job: str | Path | Mapping[str, Any] | TransferJob, overrides: Sequence[str], defaults: DefaultsByNamespace
) -> TransferJob:
    if isinstance(job, str | Path):
        models = read_files([Path(job)], overrides, defaults)
        if len(models) != 1:
            raise SettingError(f"{job} contains {len(models)} jobs, but apply accepts one. Use topwork submit.")
        return models[0][1]
    if overrides:
        raise SettingError("overrides change the values of a file. Change a mapping or a model itself.")
    return parse_transfer_job(build_transfer_job(job, None) if isinstance(job, TransferJob) else dict(job), defaults)


def _watch(cluster: Cluster, name: str, poll_seconds: float) -> Iterator[KubernetesObject]:
    """Yield a TransferJob now and after each change, across outages of the API server."""
    last_answer = time.monotonic()
    while True:
        try:
            for obj in watch_transfer_job(cluster, name, poll_seconds):
                last_answer = time.monotonic()
                yield obj
        except UnavailableError:
            if time.monotonic() - last_answer > OUTAGE_SECONDS:
                raise
            time.sleep(RETRY_SECONDS)


def _require_complete(name: str, obj: KubernetesObject) -> TransferJobStatus:
    final, run = read_transfer_job_status(obj), read_transfer_job_run(obj)
    if final.state == "Complete":
        return final
    kind = JobCanceledError if final.state == "Cancelled" else JobFailedError
    default = "the run was canceled" if final.state == "Cancelled" else "no reason given"
    raise kind(name, final, run.exit_code or 1, run.error or default)


def _ignore(_: str) -> None:
    """Drop a progress message."""
