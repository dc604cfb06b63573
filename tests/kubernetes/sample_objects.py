"""Sample Jobs, pods and events of a run, as a real cluster returns them at any time in the life of the run.

The specs are rendered by topwork. The statuses use the fields, reasons and messages of Kubernetes 1.31 to 1.37, the
kubelet, the scheduler, the cluster autoscaler and Kueue.
"""

import copy
import hashlib
import json
from datetime import UTC, datetime, timedelta
from typing import Any

from topwork.cluster.manifests.render import RenderOptions, render
from topwork.cluster.termination_message import TerminationMessage
from topwork.spec import TransferJob

Object = dict[str, Any]

NOW = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)
NAMESPACE = "team-a"
IMAGE = "registry.example.com/topwork:1-gpu"
MODEL = "s3://bucket/topwork/models/flowers/3/"
NODE = "gpu-1"
INDEX_KEY = "batch.kubernetes.io/job-completion-index"
SOURCE_NOTE = "Note: the pod checks the source, not this command: no storage is configured here"
"""Printed to standard error by `topwork submit` without AWS variables."""

CPU_SPEC = {
    "storage": "s3://photos/topwork",
    "dataset": {
        "source": {"tfds": "cats_vs_dogs"},
        "splits": {"train": "train[:80%]", "test": "train[80%:]"},
        "imageSize": [96, 96],
    },
    "model": {"base": {"application": "MobileNetV2"}},
    "compute": {"gpus": 0},
}
"""`spec` of a small job on CPUs."""
SPEC = {
    "apiVersion": "topwork.dev/v1alpha1",
    "kind": "TransferJob",
    "metadata": {"name": "flowers"},
    "spec": {
        "storage": "s3://bucket/topwork",
        "dataset": {
            "source": {"folder": {"uri": "s3://photos/flowers/"}},
            "splits": {"train": "train[:80%]", "validation": "train[80%:]"},
            "imageSize": [96, 96],
        },
        "model": {"base": {"application": "MobileNetV2"}},
        "fineTune": {"epochs": 10},
        "publish": {"formats": ["keras"]},
        "compute": {"gpus": 2, "memory": "32Gi", "retries": 3, "deadlineSeconds": 3600},
    },
}


def spec(**compute: Any) -> Object:
    """Return the spec of the job `flowers` with changed values of `spec.compute`."""
    content = copy.deepcopy(SPEC)
    content["spec"]["compute"] |= compute
    return content


def transfer_job(**compute: Any) -> TransferJob:
    return TransferJob.model_validate(spec(**compute))


RUN = transfer_job().run


def at(seconds: float) -> str:
    """Return a Kubernetes timestamp, in seconds after the creation of the Job."""
    return (NOW + timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%SZ")


def uid(name: str) -> str:
    digits = hashlib.sha256(name.encode()).hexdigest()
    return f"{digits[:8]}-{digits[8:12]}-4{digits[13:16]}-a{digits[17:20]}-{digits[20:32]}"


# Jobs


def job(*conditions: Object, role: str = "training", status: Object | None = None, **compute: Any) -> Object:
    """Return a Job as stored by the API server, with the conditions of its status."""
    job_spec = transfer_job(**({"prefetch": True} if role == "prefetch" else {}), **compute)
    rendered = render(job_spec, RenderOptions(IMAGE, NAMESPACE))
    obj = copy.deepcopy(rendered.prefetch if role == "prefetch" else rendered.training)
    assert obj is not None
    obj["metadata"] |= {"uid": uid(obj["metadata"]["name"]), "creationTimestamp": at(0), "generation": 1}
    obj["status"] = {"startTime": at(0), "terminating": 0, "uncountedTerminatedPods": {}, **(status or {})}
    if conditions:
        obj["status"]["conditions"] = list(conditions)
    return obj


def job_condition(kind: str, reason: str, message: str, seconds: float = 600) -> Object:
    return {
        "type": kind,
        "status": "True",
        "lastProbeTime": at(seconds),
        "lastTransitionTime": at(seconds),
        "reason": reason,
        "message": message,
    }


def success_criteria_met() -> Object:
    return job_condition("SuccessCriteriaMet", "CompletionsReached", "Reached expected number of succeeded pods")


def complete() -> Object:
    return job_condition("Complete", "CompletionsReached", "Reached expected number of succeeded pods")


def completed_job(**compute: Any) -> Object:
    status = {"succeeded": 1, "ready": 0, "completionTime": at(600)}
    return job(success_criteria_met(), complete(), status=status, **compute)


def failed_by_policy(
    container: str, code: int, kind: str = "Failed", pod: str = "abcde", role: str = "training"
) -> Object:
    name = f"{RUN}-pull" if role == "prefetch" else RUN
    message = (
        f"Container {container} for pod {NAMESPACE}/{name}-{pod} failed with exit code {code} "
        "matching FailJob rule at index 0"
    )
    return job_condition(kind, "PodFailurePolicy", message)


def backoff_limit_exceeded(kind: str = "Failed") -> Object:
    return job_condition(kind, "BackoffLimitExceeded", "Job has reached the specified backoff limit")


def deadline_exceeded(kind: str = "Failed") -> Object:
    return job_condition(kind, "DeadlineExceeded", "Job was active longer than specified deadline")


def failed_job(*conditions: Object, failures: int = 1, role: str = "training", **compute: Any) -> Object:
    return job(*conditions, role=role, status={"failed": failures, "ready": 0}, **compute)


def suspended_job(queue: str | None = "team-a") -> Object:
    obj = job(job_condition("Suspended", "JobSuspended", "Job suspended"), **({"queue": queue} if queue else {}))
    obj["spec"]["suspend"] = True
    del obj["status"]["startTime"]
    return obj


# Pods


def waiting(reason: str = "PodInitializing", message: str | None = None) -> Object:
    return {"waiting": {"reason": reason, **({"message": message} if message else {})}}


def running(seconds: float = 10) -> Object:
    return {"running": {"startedAt": at(seconds)}}


def terminated(
    code: int, message: str | TerminationMessage = "", reason: str | None = None, since: float = 10
) -> Object:
    text = message if isinstance(message, str) else message.to_json()
    return {
        "terminated": {
            "exitCode": code,
            "reason": reason or ("Completed" if code == 0 else "Error"),
            "startedAt": at(since),
            "finishedAt": at(since + 90),
            "containerID": "containerd://0123456789abcdef",
            **({"message": text} if text else {}),
        }
    }


def done(stage: str, since: float = 10, **fields: Any) -> Object:
    return terminated(0, TerminationMessage(stage=stage, outcome="done", exit_code=0, run=RUN, **fields), since=since)


def stopped(stage: str, since: float = 10, **fields: Any) -> Object:
    message = TerminationMessage(
        stage=stage, outcome="stopped", exit_code=143, run=RUN, error="stopped at epoch 3", **fields
    )
    return terminated(143, message, since=since)


def failed(stage: str, code: int, error: str, since: float = 10, **fields: Any) -> Object:
    message = TerminationMessage(stage=stage, outcome="failed", exit_code=code, run=RUN, error=error, **fields)
    return terminated(code, message, since=since)


def pod(
    states: dict[str, Object] | None = None,
    *,
    of: Object | None = None,
    suffix: str = "abcde",
    index: int | None = None,
    node: str | None = NODE,
    phase: str | None = None,
    conditions: tuple[Object, ...] = (),
    created: float = 1,
    deleted: float | None = None,
    **status: Any,
) -> Object:
    """Return a pod of a Job with the states of its containers; all other containers are waiting.

    Args:
        states: State of containers by name.
        of: The Job.
        suffix: End of the name.
        index: Completion index; None if the Job is not Indexed.
        node: Node that the pod is scheduled to.
        phase: Phase; None for the one that follows from the containers.
        conditions: Conditions in addition to PodScheduled.
        created: When it was created, in seconds after the creation of the Job.
        deleted: When it was deleted.
        status: Other fields of the status.
    """
    owner = of or job()
    template = copy.deepcopy(owner["spec"]["template"])
    prefix = owner["metadata"]["name"] + ("" if index is None else f"-{index}")
    name = f"{prefix}-{suffix}"
    metadata = {
        **template["metadata"],
        "name": name,
        "generateName": f"{prefix}-",
        "namespace": NAMESPACE,
        "uid": uid(name),
        "creationTimestamp": at(created),
        "finalizers": ["batch.kubernetes.io/job-tracking"],
        "ownerReferences": [
            {
                "apiVersion": "batch/v1",
                "kind": "Job",
                "name": owner["metadata"]["name"],
                "uid": owner["metadata"]["uid"],
                "controller": True,
                "blockOwnerDeletion": True,
            }
        ],
    }
    if deleted is not None:
        metadata |= {"deletionTimestamp": at(deleted + 300), "deletionGracePeriodSeconds": 300}
    if index is not None:
        add_completion_index(metadata, template["spec"], prefix, index)
    if node:
        template["spec"]["nodeName"] = node
    states = {**_default_states(template["spec"]), **(states or {})}
    pod_status: Object = {"phase": phase or _phase(template["spec"], states), "qosClass": "Guaranteed", **status}
    pod_status["conditions"] = [_scheduled(), *conditions] if node else list(conditions)
    for specs, statuses in (("initContainers", "initContainerStatuses"), ("containers", "containerStatuses")):
        if node and specs in template["spec"]:
            pod_status[statuses] = [
                _container_status(container, states[container["name"]]) for container in template["spec"][specs]
            ]
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"], "status": pod_status}


def completion_index(obj: Object) -> int | None:
    """Return the completion index of a pod; None if its Job is not Indexed."""
    index = obj["metadata"].get("annotations", {}).get(INDEX_KEY)
    return None if index is None else int(index)


def add_completion_index(metadata: Object, pod_spec: Object, hostname: str, index: int) -> None:
    """Add what the Job controller adds to a pod of an Indexed Job: annotation, label, host name and variable."""
    for fields in ("labels", "annotations"):
        metadata[fields] = {**metadata.get(fields, {}), INDEX_KEY: str(index)}
    pod_spec["hostname"] = hostname
    variable: Object = {"name": "JOB_COMPLETION_INDEX"}
    variable |= {"valueFrom": {"fieldRef": {"fieldPath": f"metadata.labels['{INDEX_KEY}']"}}}
    for container in [*pod_spec.get("initContainers", []), *pod_spec["containers"]]:
        container["env"] = [*container.get("env", []), variable]


def _phase(pod_spec: Object, states: dict[str, Object]) -> str:
    """Return the phase: Pending until the main container has started."""
    return "Running" if "waiting" not in states[pod_spec["containers"][0]["name"]] else "Pending"


def _default_states(pod_spec: Object) -> dict[str, Object]:
    return {
        container["name"]: waiting() for key in ("initContainers", "containers") for container in pod_spec.get(key, ())
    }


def _container_status(container: Object, state: Object) -> Object:
    has_started = "waiting" not in state
    return {
        "name": container["name"],
        "image": container["image"],
        "imageID": f"{container['image']}@sha256:0123" if has_started else "",
        "lastState": {},
        "ready": state.get("terminated", {}).get("exitCode") == 0,
        "restartCount": 0,
        "started": "running" in state,
        "state": state,
    }


def _scheduled() -> Object:
    return {"type": "PodScheduled", "status": "True", "lastProbeTime": None, "lastTransitionTime": at(2)}


def not_scheduled(message: str, reason: str = "Unschedulable") -> Object:
    return {
        "type": "PodScheduled",
        "status": "False",
        "lastProbeTime": None,
        "lastTransitionTime": at(2),
        "reason": reason,
        "message": message,
    }


def pending_pod(message: str, **more: Any) -> Object:
    """Return a pod that the scheduler cannot place on any node."""
    return pod(node=None, phase="Pending", conditions=(not_scheduled(message),), **more)


NO_GPUS = (
    "0/5 nodes are available: 2 node(s) had untolerated taint {node-role.kubernetes.io/control-plane: }, "
    "3 Insufficient nvidia.com/gpu. preemption: 0/5 nodes are available: 2 Preemption is not helpful for scheduling, "
    "3 No preemption victims found for incoming pod."
)


def disruption(reason: str, message: str) -> Object:
    return {
        "type": "DisruptionTarget",
        "status": "True",
        "lastProbeTime": None,
        "lastTransitionTime": at(120),
        "reason": reason,
        "message": message,
    }


def preemption() -> Object:
    return disruption("PreemptionByScheduler", "default-scheduler: preempting to accommodate a higher priority pod")


PULLED = {"pull": done("pull")}
TRANSFERRED = PULLED | {"transfer": done("transfer", since=100, epochs=5, metric="validation_accuracy", value=0.91)}


def published() -> Object:
    return done("fine-tune", since=200, epochs=10, metric="accuracy", value=0.97, model=MODEL)


def finished_pod(**more: Any) -> Object:
    return pod(TRANSFERRED | {"fine-tune": published()}, phase="Succeeded", **more)


# Events


def event(
    involved: Object, reason: str, message: str, seconds: float = 30, kind: str = "Warning", **more: Any
) -> Object:
    name = involved["metadata"]["name"]
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {
            "name": f"{name}.{hashlib.sha256((reason + message).encode()).hexdigest()[:16]}",
            "namespace": NAMESPACE,
            "creationTimestamp": at(seconds),
        },
        "involvedObject": {
            "kind": involved["kind"],
            "name": name,
            "namespace": NAMESPACE,
            "uid": involved["metadata"]["uid"],
        },
        "type": kind,
        "reason": reason,
        "message": message,
        "count": 1,
        "firstTimestamp": at(seconds),
        "lastTimestamp": at(seconds),
        **more,
    }


QUOTA = (
    f'Error creating: pods "{RUN}-abcde" is forbidden: exceeded quota: gpus, requested: requests.nvidia.com/gpu=2, '
    "used: requests.nvidia.com/gpu=7, limited: requests.nvidia.com/gpu=8"
)
POD_SECURITY = (
    f'Error creating: pods "{RUN}-abcde" is forbidden: violates PodSecurity "restricted:latest": '
    'allowPrivilegeEscalation != false (container "istio-init" must set '
    "securityContext.allowPrivilegeEscalation=false)"
)


# Logs


def epoch_line(stage: str, epoch: int, epochs: int, accuracy: float) -> str:
    """Return the log line that `topwork stage` writes after an epoch."""
    return json.dumps(
        {
            "time": at(100 + epoch),
            "message": "epoch",
            "stage": stage,
            "epoch": epoch,
            "epochs": epochs,
            "loss": 0.5,
            "validation_accuracy": accuracy,
        }
    )
