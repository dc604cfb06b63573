"""How a run stands in the cluster, told from its Jobs, their pods and the events about them."""

from dataclasses import dataclass, replace
from datetime import datetime

from topwork.clients.kubernetes import KubernetesObject
from topwork.cluster.names import JOB_LABEL, QUEUE_LABEL, RUN_LABEL
from topwork.cluster.status.attempts import Attempt, Container, read_attempt
from topwork.cluster.status.epochs import Epoch
from topwork.cluster.status.objects import RunObjects, condition, created, label, moment, name_of, of_job
from topwork.cluster.status.phase import Phase, read_standing


@dataclass(frozen=True)
class RunState:
    """How a run stands.

    Attributes:
        job: Name of the job, as in `metadata.name` of the spec.
        run: Name of the run.
        namespace: Its namespace.
        phase: How it stands, in a word or two.
        stage: The stage that is at work, or that was last.
        attempts: The pods of the Job, the oldest first.
        failures: Failed attempts that count against the retries.
        retries: How many such failures the Job survives.
        epoch: How far the stage is.
        metric: Name of the best metric that is known.
        value: Its value.
        model: Where the published model lies.
        exit_code: Exit code of the run; None until it is over.
        error: Why it failed.
        reason: Why it waits or stops.
        created: When the Job was created.
        ended: When it ended.
        node: The node that it is on, or was.
        queue: The Kueue queue.
    """

    job: str
    run: str
    namespace: str
    phase: Phase
    stage: str | None = None
    attempts: tuple[Attempt, ...] = ()
    failures: int = 0
    retries: int = 0
    epoch: Epoch | None = None
    metric: str | None = None
    value: float | None = None
    model: str | None = None
    exit_code: int | None = None
    error: str | None = None
    reason: str | None = None
    created: datetime | None = None
    ended: datetime | None = None
    node: str | None = None
    queue: str | None = None

    @property
    def is_over(self) -> bool:
        """Whether nothing will change any more."""
        return self.phase in {"succeeded", "failed"}

    @property
    def running(self) -> tuple[str, str] | None:
        """Pod and container whose log grows."""
        for attempt in reversed(self.attempts):
            for container in attempt.containers:
                if container.state == "running":
                    return attempt.pod, container.stage
        return None


def run_state(objects: RunObjects, epoch: Epoch | None = None) -> RunState:
    """Tell how a run stands.

    Args:
        objects: What the cluster holds of it: at least one Job.
        epoch: How far the running stage is, from its log.

    Returns:
        The state of its training Job; while that waits for a Job that pulls ahead, the state of that one.
    """
    training, prefetch = objects.job("training"), objects.job("prefetch")
    if training is None:
        return _ahead(job_state(objects, prefetch or objects.jobs[0], epoch))
    state = job_state(objects, training, epoch)
    if prefetch is None or state.phase not in {"pending", "suspended"}:
        return state
    ahead = job_state(objects, prefetch)
    if ahead.is_over or ahead.phase == "stopping":
        return state
    return replace(state, phase="pulling ahead", stage="pull", reason=ahead.reason or state.reason, node=ahead.node)


def _ahead(state: RunState) -> RunState:
    """A dataset that is pulled is no trained model: what follows is still to be submitted."""
    if state.phase == "succeeded":
        reason = "the dataset is pulled; submit the job again to train"
        return replace(state, phase="pending", exit_code=None, ended=None, reason=reason)
    return replace(state, phase="pulling ahead") if state.phase in {"pending", "running"} else state


def job_state(objects: RunObjects, job: KubernetesObject, epoch: Epoch | None = None) -> RunState:
    """Tell how a single Job stands; see `run_state`."""
    attempts = tuple(read_attempt(pod, job, objects.deleted) for pod in of_job(objects.pods, job))
    status = job.get("status") or {}
    last = attempts[-1] if attempts else None
    current = last.current if last else None
    epoch = epoch if epoch and current and current.stage == epoch.stage and current.state == "running" else None
    best = _best(attempts, epoch)
    standing = read_standing(objects, job, attempts)
    return RunState(
        job=label(job, JOB_LABEL) or name_of(job),
        run=label(job, RUN_LABEL) or name_of(job),
        namespace=str(job["metadata"].get("namespace") or ""),
        phase=standing.phase,
        stage=current.stage if current else None,
        attempts=attempts,
        failures=int(status.get("failed") or 0),
        retries=int(job["spec"].get("backoffLimit") or 0),
        epoch=epoch,
        metric=best[0],
        value=best[1],
        model=_model(attempts),
        exit_code=standing.exit_code,
        error=standing.error,
        reason=standing.reason,
        created=created(job),
        ended=_ended(job),
        node=last.node if last else None,
        queue=label(job, QUEUE_LABEL),
    )


def _best(attempts: tuple[Attempt, ...], epoch: Epoch | None) -> tuple[str | None, float | None]:
    """The metric of the running stage, or of the last one that ended."""
    if epoch and epoch.metric:
        return epoch.metric, epoch.best
    for container in _newest_first(attempts):
        if container.ending and container.ending.metric is not None:
            return container.ending.metric, container.ending.value
    return None, None


def _model(attempts: tuple[Attempt, ...]) -> str | None:
    models = (container.ending.model for container in _newest_first(attempts) if container.ending)
    return next((model for model in models if model), None)


def _newest_first(attempts: tuple[Attempt, ...]) -> list[Container]:
    return [container for attempt in reversed(attempts) for container in reversed(attempt.containers)]


def _ended(job: KubernetesObject) -> datetime | None:
    status = job.get("status") or {}
    over = condition(job, "Complete") or condition(job, "Failed") or {}
    return moment(status.get("completionTime") or over.get("lastTransitionTime"))
