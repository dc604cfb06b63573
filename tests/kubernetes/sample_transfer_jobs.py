"""Sample TransferJobs with the statuses that the controller writes."""

from typing import Any

import sample_objects
from api_server import ApiServer, owner_references
from sample_objects import MODEL, RUN

Object = dict[str, Any]
CONDITIONS = ("Accepted", "Suspended", "Complete", "Failed", "Cancelled")


def condition(kind: str, status: str, reason: str, message: str = "") -> Object:
    return {
        "type": kind,
        "status": status,
        "reason": reason,
        "message": message,
        "lastTransitionTime": sample_objects.at(1),
        "observedGeneration": 1,
    }


def status(state: str, *conditions: Object, generation: int = 1, **values: Any) -> Object:
    """Return a status, with the usual conditions of its state except for those that are given."""
    given = {item["type"]: item for item in conditions}
    usual = {
        kind: condition(kind, str(kind in {"Accepted", state}), "Valid" if kind == "Accepted" else state)
        for kind in CONDITIONS
    }
    return {
        "observedGeneration": generation,
        "state": state,
        "run": RUN,
        "startTime": sample_objects.at(0),
        "conditions": list((usual | given).values()),
    } | values


PENDING = status("Pending", waitingFor="the queue team-a has no free GPUs")
SUSPENDED = status(
    "Suspended",
    condition("Suspended", "True", "SuspendRequested", "spec.suspend is true"),
    stage="transfer",
    progress="3/20 epochs",
    metric="validation_accuracy 0.9100",
)
COMPLETE = status(
    "Complete",
    stage="fine-tune",
    metric="accuracy 0.9700",
    model=MODEL,
    modelVersion=3,
    exitCode=0,
    gpus=2,
    gpuSeconds=7200.0,
    attempts=1,
    attemptHistory=[{"pod": f"{RUN}-abcde", "uid": "1", "node": "gpu-1", "exitCode": 0, "gpuSeconds": 7200.0}],
    completionTime=sample_objects.at(600),
)
FAILED = status(
    "Failed",
    stage="pull",
    error="no bucket photos",
    exitCode=2,
    failures=1,
    attempts=1,
    attemptHistory=[{"pod": f"{RUN}-abcde", "uid": "1", "node": "gpu-1", "exitCode": 2, "error": "no bucket photos"}],
    completionTime=sample_objects.at(600),
)
CANCELLED = status("Cancelled", stage="transfer", completionTime=sample_objects.at(600))
INVALID = status(
    "Failed",
    condition("Accepted", "False", "InvalidSpec", "spec.a: wrong\nspec.b: wrong, too"),
    error="spec.a: wrong\nspec.b: wrong, too",
    exitCode=2,
    run=None,
)


def transfer_job(current: Object | None = None, **compute: Any) -> Object:
    """Return the TransferJob of the sample spec with a status; None if no controller has processed it."""
    obj = sample_objects.spec(**compute)
    obj["metadata"] |= {"namespace": "team-a", "generation": 1}
    return obj | ({"status": {key: value for key, value in current.items() if value is not None}} if current else {})


def put_transfer_job(server: ApiServer, current: Object | None = None, **compute: Any) -> Object:
    return server.put(transfer_job(current, **compute))


def set_status(server: ApiServer, current: Object) -> Object:
    """Replace the status, as the controller does."""
    server.patch("TransferJob", "flowers", {"status": None})
    return server.patch("TransferJob", "flowers", {"status": current})


def put_job(server: ApiServer, owner: Object) -> Object:
    """Store the Job of a TransferJob, as the controller creates it."""
    job = sample_objects.job()
    job["metadata"]["ownerReferences"] = owner_references(owner)
    return server.put(job)
