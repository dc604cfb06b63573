"""Decides what to do for a TransferJob, and what its status is. No I/O: the same observation gives the same plan."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from topwork.clients.kubernetes import KubernetesObject
from topwork.cluster.controller.attempt_history import update_history
from topwork.cluster.controller.conditions import Fact, update_conditions
from topwork.cluster.controller.observation import Observation
from topwork.cluster.controller.run_objects import job_with_ttl, labels_digest, updated_job
from topwork.cluster.controller.spec_resolution import Rejection, Target
from topwork.cluster.controller.status_update import (
    build_status,
    completed,
    describe_wait,
    facts_of,
    gpus_of,
    job_values,
    read_job,
    read_outcome,
)
from topwork.cluster.manifests.render import RenderedObjects
from topwork.cluster.names import (
    GENERATION_ANNOTATION,
    LABELS_ANNOTATION,
    RESTART_ANNOTATION,
    RUN_LABEL,
    TEMPLATE_ANNOTATION,
)
from topwork.cluster.status.objects import (
    find_condition,
    get_annotation,
    get_label,
    is_being_deleted,
    is_job_finished,
    is_pod_unfinished,
    node_count,
)
from topwork.cluster.transfer_job_status import ConditionType, State, TransferJobStatus
from topwork.errors import SpecError, Stopped

COMPLETED_BEFORE = "CompletedBefore"
"""Reason of the condition Complete if the run is complete, but the spec has become invalid since."""


@dataclass(frozen=True)
class DeleteJob:
    """Delete a Job, after its pods; and its ConfigMap, Service and NetworkPolicy if another run replaces this one."""

    job: KubernetesObject
    with_dependencies: bool = False


@dataclass(frozen=True)
class CreateRun:
    """Create the ConfigMap of a run and one of its Jobs.

    Attributes:
        job: The Job.
        config_map: The ConfigMap.
        stale_config_map: UID of a ConfigMap with that name to delete first.
        network: Service and NetworkPolicy between several nodes; empty for one node.
        stale_network: Existing ones to delete first.
    """

    job: KubernetesObject
    config_map: KubernetesObject
    stale_config_map: str | None = None
    network: Sequence[KubernetesObject] = ()
    stale_network: Sequence[KubernetesObject] = ()


@dataclass(frozen=True)
class UpdateRun:
    """Change the ConfigMap of a run and its Job, without its pod template, and restore what connects its nodes."""

    job: KubernetesObject
    config_map: KubernetesObject
    network: Sequence[KubernetesObject] = ()


Action = DeleteJob | CreateRun | UpdateRun


@dataclass(frozen=True)
class Plan:
    """What to do for a TransferJob.

    Attributes:
        status: Its status, once the actions are done.
        actions: Actions before the status is stored.
        ttl_jobs: Finished Jobs to apply with their TTL after the status is stored.
        needs_target: Whether the decision depends on what the spec asks for; nothing else is decided yet.
        rejection: Why the TransferJob is not accepted, if that may change without a change of its spec.
    """

    status: TransferJobStatus
    actions: tuple[Action, ...] = ()
    ttl_jobs: tuple[KubernetesObject, ...] = ()
    needs_target: bool = False
    rejection: Rejection | None = None


def decide(seen: Observation, target: Target | Rejection | None = None) -> Plan:
    """Decide what to do for a TransferJob.

    Args:
        seen: The TransferJob, its Jobs and pods.
        target: What its spec asks for; None if that is not known yet.

    Returns:
        The plan.
    """
    if seen.is_settled:
        if seen.previous.is_final:
            return _keep_outcome(seen)
        target = target or _known_rejection(seen)
    elif target is None:
        return Plan(seen.previous, needs_target=True)
    if isinstance(target, Rejection):
        return _reject(seen, target)
    return _pursue(seen, target)


# ── Accepted specs ──────────────────────────────────────────────────────────────────────────────────────────────────


def _pursue(seen: Observation, target: Target | None) -> Plan:
    """Bring the run about that the spec asks for."""
    previous = seen.previous
    run = target.run if target else str(previous.run)
    job = seen.own_job(run)
    if outcome := _find_outcome(seen, run, job, target):
        return outcome
    if seen.canceled_run == run:
        return _stop(seen, run, "Cancelled")
    if seen.is_suspended:
        return _stop(seen, run, "Suspended")
    if target and target.unowned_job and target.objects and _is_adoptable(target):
        return Plan(previous, (_update_run(target.unowned_job, target.objects),))
    obstacles = _obstacles(seen, run, job, target)
    blocking = seen.blocking_pods(run)
    if obstacles or blocking:
        return _wait(seen, run, obstacles, blocking, target)
    if job is None:
        return _create(seen, target) if target else Plan(previous, needs_target=True)
    if target is None and not _has_current_labels(seen, job):
        return Plan(previous, needs_target=True)
    return _follow(seen, run, target, _update(seen, job, target))


def _find_outcome(seen: Observation, run: str, job: KubernetesObject | None, target: Target | None) -> Plan | None:
    """Return the plan for a run that is finished and must not start again; None for any other."""
    previous = seen.previous
    if job is None or is_being_deleted(job):
        return _restore_completion(seen) if previous.run == run and _was_completed(previous) else None
    status = read_job(seen, job)
    if status.phase == "succeeded" or (status.phase == "failed" and _is_current(seen, job)):
        deletions = _delete_jobs(seen.stale_jobs(run), run)
        return _follow(seen, run, target, (*_update(seen, job, target), *deletions))
    return None


def _is_current(seen: Observation, job: KubernetesObject) -> bool:
    """Return whether a Job was created for, or adapted to, this generation of the spec."""
    return get_annotation(job, GENERATION_ANNOTATION) == str(seen.generation)


def _has_current_labels(seen: Observation, job: KubernetesObject) -> bool:
    """Return whether a Job has the labels of the TransferJob, which can change without a new generation."""
    return get_annotation(job, LABELS_ANNOTATION) == labels_digest(seen.transfer_job)


def _update(seen: Observation, job: KubernetesObject, target: Target | None) -> tuple[Action, ...]:
    """Adapt a Job to a new generation of the spec, or to new labels."""
    if target is None or target.objects is None or (_is_current(seen, job) and _has_current_labels(seen, job)):
        return ()
    return (_update_run(job, target.objects),)


def _update_run(job: KubernetesObject, objects: RenderedObjects) -> UpdateRun:
    """Return the action that adapts an existing Job, and the objects that it depends on, to the spec."""
    # Before a Job with other nodes is replaced, its pods still need what connects them.
    network = objects.network if node_count(job) == node_count(objects.training) else ()
    return UpdateRun(updated_job(job, objects.training), objects.config_map, network)


def _obstacles(
    seen: Observation, run: str, job: KubernetesObject | None, target: Target | None
) -> list[KubernetesObject]:
    """Return the Jobs that must be gone before the run may go on."""
    obstacles = seen.stale_jobs(run)
    if job and (is_being_deleted(job) or _must_be_replaced(seen, job, target)):
        obstacles.append(job)
    if target and target.unowned_job and not _is_adoptable(target):
        obstacles.append(target.unowned_job)
    return obstacles


def _must_be_replaced(seen: Observation, job: KubernetesObject, target: Target | None) -> bool:
    """Return whether a Job can't be adapted: it failed with an earlier spec, or its pods have to change."""
    if target is None or target.objects is None or _is_current(seen, job):
        return False
    desired = get_annotation(target.objects.training, TEMPLATE_ANNOTATION)
    return _has_failed(job) or get_annotation(job, TEMPLATE_ANNOTATION) != desired


def _has_failed(job: KubernetesObject) -> bool:
    return bool(find_condition(job, "Failed") or find_condition(job, "FailureTarget"))


def _is_adoptable(target: Target) -> bool:
    """Return whether a Job of `submit` is kept; a failed one is replaced, as `submit` does."""
    job = target.unowned_job
    if job is None or target.objects is None or is_being_deleted(job) or _has_failed(job):
        return False
    annotations = target.objects.training["spec"]["template"]["metadata"].get("annotations") or {}
    return RESTART_ANNOTATION not in annotations


def _create(seen: Observation, target: Target) -> Plan:
    """Create the Jobs of a run. The Job that only pulls comes first, so that no GPU is idle during the download."""
    if target.objects is None:
        return Plan(seen.previous, needs_target=True)
    objects, prefetch = target.objects, seen.prefetch_job(target.run)
    next_job = objects.training
    if objects.prefetch and not (prefetch and is_job_finished(prefetch)):
        if prefetch:
            return _follow(seen, target.run, target)
        next_job = objects.prefetch
    status = build_status(seen, target.run, "Pending", gpus=gpus_of(objects.training))
    network = objects.network if next_job is objects.training else ()
    create = CreateRun(next_job, objects.config_map, target.stale_config_map, network, target.stale_network)
    return Plan(status, (create,))


def _stop(seen: Observation, run: str, state: State) -> Plan:
    """Stop all Jobs of the TransferJob; their pods write a checkpoint."""
    jobs = [job for job in seen.jobs if seen.owns(job) or seen.is_of_earlier_transfer_job(job)]
    fact = {
        "Cancelled": Fact("CancelledByUser", f"the annotation topwork.dev/cancel names the run {run}"),
        "Suspended": Fact("SuspendedBySpec", "spec.suspend is true"),
    }[state]
    kind: ConditionType = "Cancelled" if state == "Cancelled" else "Suspended"
    blocking = seen.blocking_pods(run) or [pod for pod in seen.own_training_pods if is_pod_unfinished(pod)]
    final: dict[str, Any] = {}
    if state == "Cancelled":
        final = {"completion_time": seen.now, "exit_code": Stopped.exit_code}
    status = build_status(seen, run, state, {kind: fact}, waiting_for=describe_wait(seen, jobs, blocking), **final)
    return Plan(status, tuple(_delete_jobs(jobs, run)))


def _wait(
    seen: Observation,
    run: str,
    jobs: Sequence[KubernetesObject],
    pods: Sequence[KubernetesObject],
    target: Target | None,
) -> Plan:
    """Delete Jobs that are in the way of a run, and wait until they and their pods are gone."""
    gpus: dict[str, Any] = {"gpus": gpus_of(target.objects.training)} if target and target.objects else {}
    status = build_status(seen, run, "Pending", waiting_for=describe_wait(seen, jobs, pods), **gpus)
    return Plan(status, tuple(_delete_jobs(jobs, run)))


def _delete_jobs(jobs: Sequence[KubernetesObject], run: str | None) -> list[DeleteJob]:
    return [
        DeleteJob(job, with_dependencies=get_label(job, RUN_LABEL) != run) for job in jobs if not is_being_deleted(job)
    ]


# ── Rejected specs ──────────────────────────────────────────────────────────────────────────────────────────────────


def _known_rejection(seen: Observation) -> Rejection | None:
    """Return why the spec was rejected before; None if it was accepted."""
    accepted = seen.previous.condition("Accepted")
    if accepted is None or accepted.status == "True":
        return None
    return Rejection("InvalidSpec", accepted.message, is_retried=False)


def _reject(seen: Observation, rejection: Rejection) -> Plan:
    """Report why a TransferJob is not accepted. A run of an earlier spec goes on, unless it is suspended."""
    facts: dict[ConditionType, Fact] = {"Accepted": Fact(rejection.reason, rejection.message, holds=False)}
    run = seen.previous.run
    retried = rejection if rejection.is_retried else None
    job = seen.own_job(run)
    if job and run and not is_being_deleted(job) and not seen.previous.is_final:
        plan = _follow(seen, run)
        if not plan.status.is_final and (seen.canceled_run == run or seen.is_suspended):
            plan = _stop(seen, run, "Cancelled" if seen.canceled_run == run else "Suspended")
        facts = facts_of(plan.status) | facts
        conditions = update_conditions(seen.previous, plan.status.state, facts, seen.generation, seen.now)
        return replace(plan, status=plan.status.model_copy(update={"conditions": conditions}), rejection=retried)
    outcome: dict[str, Any] = {"completion_time": None if retried else seen.now}
    if _was_completed(seen.previous):
        facts["Complete"] = Fact(COMPLETED_BEFORE, f"{run} is complete, but the spec has changed since", holds=False)
        outcome["completion_time"] = seen.previous.completion_time
    if retried:
        status = build_status(seen, run, "Pending", facts, waiting_for=rejection.message, **outcome)
        return Plan(status, rejection=retried)
    facts["Failed"] = Fact(rejection.reason, rejection.message)
    outcome |= {"error": rejection.message, "exit_code": SpecError.exit_code}
    return Plan(build_status(seen, run, "Failed", facts, **outcome))


def _was_completed(previous: TransferJobStatus) -> bool:
    """Return whether the run is complete, even if a later spec was rejected."""
    condition = previous.condition("Complete")
    return previous.state == "Complete" or (condition is not None and condition.reason == COMPLETED_BEFORE)


# ── The state of a run ──────────────────────────────────────────────────────────────────────────────────────────────


def _restore_completion(seen: Observation) -> Plan:
    """Keep a complete run, whose Job is gone, with another generation of the spec."""
    previous = seen.previous
    facts: dict[ConditionType, Fact] = {"Complete": completed(previous.model)}
    values: dict[str, Any] = {"completion_time": previous.completion_time, "exit_code": 0}
    return Plan(build_status(seen, previous.run, "Complete", facts, **values))


def _keep_outcome(seen: Observation) -> Plan:
    """Keep the outcome of a finished run, and only note how its last pods end."""
    previous = seen.previous
    run = previous.run
    blocking = [pod for pod in seen.own_training_pods if is_pod_unfinished(pod)] if previous.waiting_for else []
    jobs = [job for job in seen.jobs if seen.owns(job)]
    deletions = _delete_jobs(jobs, run) if previous.state == "Cancelled" else []
    is_stopping = bool(previous.waiting_for and (blocking or jobs)) or bool(deletions)
    history = update_history(previous, run, seen.own_training_pods, seen.now)
    status = previous.model_copy(
        update={
            "waiting_for": describe_wait(seen, jobs, blocking) if is_stopping else None,
            "attempt_history": history.records,
            "attempts": history.attempts,
            "gpu_seconds": history.gpu_seconds,
        }
    )
    return Plan(status, tuple(deletions), _ttl_jobs(jobs))


def _ttl_jobs(jobs: Sequence[KubernetesObject]) -> tuple[KubernetesObject, ...]:
    finished = [job for job in jobs if is_job_finished(job) and not is_being_deleted(job)]
    return tuple(applied for job in finished if (applied := job_with_ttl(job)))


def _follow(seen: Observation, run: str, target: Target | None = None, actions: Sequence[Action] = ()) -> Plan:
    """Report the state of the Jobs of a run."""
    training, prefetch = seen.own_job(run), seen.prefetch_job(run)
    job = training or prefetch
    if job is None or (training is None and is_job_finished(job)):
        return Plan(seen.previous, needs_target=True)
    read = read_job(seen, job)
    values: dict[str, Any] = job_values(seen, run, training, read) if training else {}
    if target and target.objects:
        values |= {"gpus": gpus_of(target.objects.training)}
    if training and read.is_finished:
        status = build_status(seen, run, *read_outcome(training, read), read=read, **values)
        return Plan(status, tuple(actions), _ttl_jobs([own for own in seen.jobs if seen.owns(own)]))
    state: State = "Pending" if read.phase in {"pending", "suspended"} else "Running"
    waiting_for = read.reason
    if is_being_deleted(job):
        state, waiting_for = "Pending", describe_wait(seen, [job], seen.blocking_pods(run))
    elif state == "Pending" and seen.events is None and seen.previous.state == "Pending":
        waiting_for = seen.previous.waiting_for
    return Plan(build_status(seen, run, state, read=read, waiting_for=waiting_for, **values), tuple(actions))
