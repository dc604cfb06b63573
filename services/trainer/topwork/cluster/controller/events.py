"""Kubernetes events about a TransferJob: one at each change of its state, with a deterministic name."""

import hashlib
from collections.abc import Iterator
from datetime import datetime
from typing import NamedTuple

from topwork.clients.kubernetes import KubernetesObject
from topwork.cluster.controller.observation import Observation
from topwork.cluster.names import CONTROLLER_MANAGER
from topwork.cluster.status.objects import name_of
from topwork.cluster.transfer_job_status import TransferJobStatus
from topwork.errors import shorten

MAX_MESSAGE_CHARACTERS = 1000
"""The API server allows 1,024 characters."""
REASONS = {"Running": "Running", "Suspended": "Suspended", "Complete": "Completed", "Cancelled": "Cancelled"}


class Report(NamedTuple):
    """Reason and message of an event, and whether it is a warning."""

    reason: str
    message: str
    is_warning: bool = False


def describe_changes(previous: TransferJobStatus, status: TransferJobStatus) -> Iterator[Report]:
    """Describe how the status of a TransferJob changed.

    Args:
        previous: The last status.
        status: The new status.

    Yields:
        What to report, in order.
    """
    before, accepted = previous.condition("Accepted"), status.condition("Accepted")
    is_rejected = accepted is not None and accepted.status == "False"
    if accepted and is_rejected and (before is None or before.message != accepted.message):
        yield Report(accepted.reason, accepted.message, is_warning=True)
    if previous.run and status.run != previous.run:
        yield Report("SpecChanged", f"{status.run} replaces {previous.run}")
    if status.job_uid and status.job_uid != previous.job_uid and status.start_time:
        verb = "Resumed" if previous.start_time and previous.run == status.run else "Created"
        yield Report(verb, f"{verb.lower()} {status.run} as job.batch/{status.run}")
    if (status.state, status.run) != (previous.state, previous.run):
        yield from _describe_state(previous, status, is_rejected)


def _describe_state(previous: TransferJobStatus, status: TransferJobStatus, is_rejected: bool) -> Iterator[Report]:
    if status.state == "Pending":
        # A run without a start time has pulled its dataset with a prefetch Job, and now waits for GPUs.
        is_same_run = previous.run == status.run and previous.observed_generation == status.observed_generation
        if previous.state == "Running" and is_same_run and previous.start_time:
            yield Report("Interrupted", f"{status.run}: {status.waiting_for or 'its pod ended'}", is_warning=True)
    elif status.state == "Failed":
        condition = status.condition("Failed")
        if condition and not is_rejected:
            yield Report(condition.reason, f"{status.run}: {status.error}", is_warning=True)
    else:
        yield Report(REASONS[status.state], _message(status))


def _message(status: TransferJobStatus) -> str:
    if status.state == "Running":
        return f"{status.run} runs stage {status.stage}"
    if status.state == "Complete":
        metric = f", {status.metric}" if status.metric else ""
        return f"{status.run} is complete{metric}" + (f": {status.model}" if status.model else "")
    waiting = f"; waiting for {status.waiting_for}" if status.waiting_for else ""
    verb = "suspended" if status.state == "Suspended" else "canceled"
    return f"{status.run} is {verb}{waiting}"


def build_event(seen: Observation, status: TransferJobStatus, report: Report) -> KubernetesObject:
    """Build an event about a TransferJob.

    Args:
        seen: The TransferJob.
        status: Its new status.
        report: What to report.

    Returns:
        The event. Its name depends on the generation, run, Job and reason, so that a controller that was killed before
        it stored the status reports nothing twice.
    """
    # A run can be interrupted, and run again, several times.
    attempt = status.attempts if report.reason in {"Running", "Interrupted"} else None
    return build_event_of(seen.transfer_job, (seen.generation, status.run, status.job_uid, attempt), report, seen.now)


def build_event_of(
    obj: KubernetesObject, occasion: tuple[object, ...], report: Report, now: datetime
) -> KubernetesObject:
    """Build an event about an object.

    Args:
        obj: The object.
        occasion: What tells the event from others about the object with the same reason.
        report: What to report.
        now: Current time.

    Returns:
        The event, whose name depends on the object, the occasion and the reason.
    """
    namespace, uid = str(obj["metadata"]["namespace"]), str(obj["metadata"]["uid"])
    identity = "|".join(map(str, (uid, *occasion, report.reason)))
    time = now.strftime("%Y-%m-%dT%H:%M:%SZ")
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {
            "name": f"{name_of(obj)}.{hashlib.sha256(identity.encode()).hexdigest()[:16]}",
            "namespace": namespace,
        },
        "involvedObject": {
            "apiVersion": obj["apiVersion"],
            "kind": obj["kind"],
            "name": name_of(obj),
            "namespace": namespace,
            "uid": uid,
        },
        "type": "Warning" if report.is_warning else "Normal",
        "reason": report.reason,
        "message": shorten(report.message, MAX_MESSAGE_CHARACTERS),
        "source": {"component": CONTROLLER_MANAGER},
        "firstTimestamp": time,
        "lastTimestamp": time,
        "count": 1,
    }
