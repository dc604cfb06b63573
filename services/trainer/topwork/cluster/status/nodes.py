"""The pods of a run on several nodes: the current ones, which of them failed first, and why some are pending."""

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta

from topwork.clients.kubernetes import KubernetesObject
from topwork.cluster.status.attempts import Attempt, describe_end
from topwork.cluster.status.objects import RunObjects, name_of, node_count, pods_of_job
from topwork.cluster.status.pending_reasons import explain_pending_job, explain_pending_pod
from topwork.errors import Stopped, UnavailableError

FAILURE_WINDOW = timedelta(seconds=120)
"""When a node fails, all others end within a minute; an earlier failure of another node is not the cause."""
MAX_LISTED_NODES = 4
NEW_PODS_FOLLOW = "new pods will be created"
UNKNOWN_TIME = datetime.max.replace(tzinfo=UTC)


def current_attempts(attempts: Iterable[Attempt]) -> dict[int, Attempt]:
    """Return the newest pod of each node.

    Args:
        attempts: The pods of all nodes, oldest first.

    Returns:
        The pods by the index of their node; a node that never had a pod is missing.
    """
    return {attempt.index: attempt for attempt in attempts}


def find_first_failure(attempts: Iterable[Attempt]) -> Attempt | None:
    """Find the pod whose end made all other nodes end, too.

    The nodes that lose a peer exit with 75, or with 143 if it was stopped. A pod that ended in another way, or that
    Kubernetes ended, is therefore the cause; among several, the one that ended first.

    Args:
        attempts: The pods of all nodes, oldest first.

    Returns:
        The pod; None if none has failed or was stopped.
    """
    ended = current_attempts(attempt for attempt in attempts if attempt.state in {"failed", "stopped"}).values()
    times = [attempt.ended for attempt in ended if attempt.ended]
    since = max(times) - FAILURE_WINDOW if times else None
    recent = [attempt for attempt in ended if since is None or (attempt.ended or UNKNOWN_TIME) >= since]
    return min(recent, key=lambda attempt: (_effect_rank(attempt), attempt.ended or UNKNOWN_TIME), default=None)


def _effect_rank(attempt: Attempt) -> int:
    """Return how likely the end of a pod is only an effect of that of another one."""
    if attempt.is_disrupted or (attempt.state == "failed" and attempt.exit_code != UnavailableError.exit_code):
        return 0
    return 2 if attempt.exit_code in {Stopped.exit_code, None} else 1


def count_failed_attempts(job: KubernetesObject, attempts: Sequence[Attempt]) -> int:
    """Count the failed attempts of a Job.

    The counter of the Job counts each pod, as does its backoffLimit. On several nodes, an attempt has several pods.

    Args:
        job: The Job.
        attempts: Its pods.

    Returns:
        The counter of the Job; on several nodes, the number of attempts in which the failure of a pod counts, and at
        least what follows from the counter, because failed pods may have been deleted.
    """
    failed_pods, nodes = int((job.get("status") or {}).get("failed") or 0), node_count(job)
    if nodes == 1:
        return failed_pods
    return max(-(-failed_pods // nodes), len({attempt.number for attempt in attempts if attempt.counted}))


def explain_pending_nodes(objects: RunObjects, job: KubernetesObject, attempts: Sequence[Attempt]) -> str | None:
    """Explain why not all nodes of a run are running.

    Args:
        objects: The objects of the run.
        job: Its Job, with several nodes.
        attempts: The pods of the Job, oldest first.

    Returns:
        The number of pods that are pending, and why; None if all are running.

    Example:
        >>> explain_pending_nodes(objects, job, attempts)
        '1 of 2 pods is pending: no node has 8 free nvidia.com/gpu (insufficient on 4 of 5)'
    """
    current, nodes = current_attempts(attempts), node_count(job)
    pending = [index for index in range(nodes) if not _runs(current.get(index))]
    if not pending:
        return None
    reasons: dict[str, list[int]] = {}
    for index in pending:
        if reason := _explain_node(objects, job, current.get(index)):
            reasons.setdefault(reason, []).append(index)
    clauses = [
        reason if len(reasons) == 1 else f"{reason} ({_list_nodes(indexes)})" for reason, indexes in reasons.items()
    ]
    if any(index in current and current[index].is_finished for index in pending):
        clauses.insert(0, _explain_replacement(job, attempts, objects))
    summary = f"{len(pending)} of {nodes} pods {'is' if len(pending) == 1 else 'are'} pending"
    return f"{summary}: {'; '.join(clauses)}" if clauses else summary


def _runs(attempt: Attempt | None) -> bool:
    return attempt is not None and attempt.state in {"running", "stopping", "done"}


def _explain_node(objects: RunObjects, job: KubernetesObject, attempt: Attempt | None) -> str | None:
    """Explain why a node has no running pod; None if that is not known, or if its last pod has just ended."""
    if attempt is None:
        return explain_pending_job(job, objects.events)
    if attempt.is_finished:
        return None
    pod = next(pod for pod in pods_of_job(objects.pods, job) if name_of(pod) == attempt.pod)
    return explain_pending_pod(pod, objects.events)


def _explain_replacement(job: KubernetesObject, attempts: Sequence[Attempt], objects: RunObjects) -> str:
    cause = find_first_failure(attempts)
    follows = explain_pending_job(job, objects.events) or NEW_PODS_FOLLOW
    return f"{describe_end(cause)}; {follows}" if cause else follows


def describe_error(attempt: Attempt, job: KubernetesObject) -> str | None:
    """Return why an attempt ended; of a Job on several nodes, with the node."""
    if attempt.error is None or node_count(job) == 1:
        return attempt.error
    return f"node {attempt.index}: {attempt.error}"


def _list_nodes(indexes: list[int]) -> str:
    more = f" and {len(indexes) - MAX_LISTED_NODES} more" if len(indexes) > MAX_LISTED_NODES else ""
    return f"node{'s' if len(indexes) > 1 else ''} {', '.join(map(str, indexes[:MAX_LISTED_NODES]))}{more}"
