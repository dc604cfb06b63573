"""Explaining why a Job or its pod is pending, with advice; unknown reasons are quoted from Kubernetes."""

import re
from collections.abc import Iterable, Iterator

from topwork.clients.kubernetes import KubernetesObject
from topwork.cluster.names import GPU_RESOURCE, QUEUE_LABEL
from topwork.cluster.status.objects import (
    StageContainer,
    find_condition,
    find_last_event,
    get_label,
    name_of,
    newest_event,
    one_line,
    requested_amount,
    stage_containers,
)

IMAGE_REASONS = {"ErrImagePull", "ImagePullBackOff", "ImageInspectError", "RegistryUnavailable", "ErrImageNeverPull"}
STARTUP_EVENTS = ("FailedMount", "FailedAttachVolume", "FailedCreatePodSandBox", "Pulling", "Pulled")
"""Events between scheduling and the start of the first container: the newest one explains the delay."""
KUEUE_EVENTS = {"Pending", "QuotaReserved", "Inadmissible", "EvictedDueToPreempted", "Preempted"}
ACCESS_DENIED = re.compile(r"denied|unauthorized|authoriz|authentication|401|403|insufficient_scope")
# Prefixes that the kubelet and containerd put before the cause of a failed image pull.
PULL_ERROR_PREFIX = re.compile(
    r"^(rpc error: code = \w+ desc = |Back-off pulling image \"[^\"]*\"(: )?|ErrImagePull: |"
    r"failed to pull and unpack image \"[^\"]*\": |failed to resolve reference \"[^\"]*\": )+"
)
QUOTA = re.compile(
    r"exceeded quota: (?P<quota>\S+), requested: (?P<requested>\S+), used: (?P<used>\S+), limited: (?P<limited>\S+)"
)
QUOTA_UNSPECIFIED = re.compile(r"failed quota: (?P<quota>[^:]+): must specify (?P<what>.+)")
POD_SECURITY = re.compile(r'violates PodSecurity "(?P<level>[^"]+)": (?P<what>.+)', re.DOTALL)
ACCOUNT = re.compile(r'serviceaccount "(?P<name>[^"]+)" not found|service account \S+/(?P<other>\S+) was not found')
PRIORITY = re.compile(r"no PriorityClass with name (?P<name>\S+) was found")
WEBHOOK = re.compile(r'admission webhook "(?P<name>[^"]+)" denied the request: (?P<what>.+)', re.DOTALL)
LIMIT_RANGE = re.compile(r"(?P<what>(maximum|minimum) \S+ usage per (Pod|Container) is .+)", re.DOTALL)
NOT_FOUND = re.compile(r'(?P<kind>configmap|secret) "(?P<name>[^"]+)" not found')
KEY_NOT_FOUND = re.compile(r"references non-existent config key: (?P<key>\S+)")


def explain_pending_job(job: KubernetesObject, events: Iterable[KubernetesObject]) -> str | None:
    """Explain why a Job has no active pod.

    Args:
        job: The Job.
        events: Events about it.

    Returns:
        The reason; None if it is not known yet.
    """
    events = list(events)
    if job["spec"].get("suspend"):
        return _explain_suspended(job, events)
    # A failed creation that succeeded later is out of date.
    last = find_last_event(events, job, "FailedCreate", "SuccessfulCreate")
    if last and last["reason"] == "FailedCreate":
        return _explain_failed_create(str(last.get("message") or ""))
    if (job.get("status") or {}).get("failed"):
        return "the next attempt starts after a back-off delay, which Kubernetes doubles each time"
    return None


def _explain_suspended(job: KubernetesObject, events: list[KubernetesObject]) -> str:
    queue = get_label(job, QUEUE_LABEL)
    if queue is None:
        return f'suspended: resume it with kubectl patch job {name_of(job)} -p \'{{"spec":{{"suspend":false}}}}\''
    # Kueue explains the cause in events about its Workload, whose name starts with that of the Job.
    prefix = f"job-{name_of(job)}-"
    about_workload = [
        event
        for event in events
        if event.get("reason") in KUEUE_EVENTS
        and str((event.get("involvedObject") or {}).get("name")).startswith(prefix)
    ]
    waiting = f"waiting for quota in the queue {queue}"
    newest = newest_event(about_workload) or {}
    if message := one_line(str(newest.get("message") or "")):
        return f"{waiting}: {message}"
    return f"{waiting}; see kubectl get workloads, and kubectl get localqueue {queue}"


def _explain_failed_create(message: str) -> str:
    """Explain why the Job controller could not create a pod, from the message of its event FailedCreate."""
    if match := QUOTA.search(message):
        return (
            f"exceeded quota {match['quota']}: requested {match['requested']}, used {match['used']}, limited to "
            f"{match['limited']}. Wait, request less, or see kubectl describe quota {match['quota']}"
        )
    if match := QUOTA_UNSPECIFIED.search(message):
        return f"the quota {match['quota']} requires every container to specify {one_line(match['what'])}"
    if match := POD_SECURITY.search(message):
        return (
            f"the pod violates the Pod Security level {match['level']} of the namespace: {one_line(match['what'])}. "
            "Did an admission webhook change the pod? Pods of topwork meet the level restricted"
        )
    if match := ACCOUNT.search(message):
        name = match["name"] or match["other"].rstrip(",")
        return f"ServiceAccount {name} not found. Create it, or change spec.compute.serviceAccountName"
    if match := PRIORITY.search(message):
        fix = "Change spec.compute.priorityClassName; see kubectl get priorityclass"
        return f"PriorityClass {match['name']} not found. {fix}"
    if match := WEBHOOK.search(message):
        return f"the admission webhook {match['name']} denied the pod: {one_line(match['what'])}"
    if match := LIMIT_RANGE.search(message):
        return f"a LimitRange rejects the pod: {one_line(match['what'])}. See kubectl describe limitrange"
    return one_line(message)


def explain_pending_pod(pod: KubernetesObject, events: Iterable[KubernetesObject]) -> str | None:
    """Explain why the first container of a pod has not started.

    Args:
        pod: The pod.
        events: Events about it.

    Returns:
        The reason; None if it is not known yet.
    """
    events = list(events)
    for container in stage_containers(pod):
        waiting = (container.status.get("state") or {}).get("waiting") or {}
        if reason := _explain_waiting_container(container, waiting):
            return reason
    node = pod["spec"].get("nodeName")
    if not node:
        return _explain_unscheduled(pod, events)
    last = find_last_event(events, pod, *STARTUP_EVENTS) or {}
    message = str(last.get("message") or "")
    if last.get("reason") in {"FailedMount", "FailedAttachVolume"}:
        return _explain_failed_mount(message)
    if last.get("reason") == "FailedCreatePodSandBox":
        return f"node {node} can't start the pod: {one_line(message)}"
    if last.get("reason") == "Pulling":
        return f"node {node} is pulling the image, which can take minutes the first time"
    return None


def _explain_waiting_container(container: StageContainer, waiting: KubernetesObject) -> str | None:
    reason = str(waiting.get("reason") or "")
    message = one_line(str(waiting.get("message") or ""))
    image = container.spec["image"]
    if reason in {"PodInitializing", "ContainerCreating"}:  # normal startup
        return None
    if reason == "InvalidImageName":
        return f"{image} is not a valid image name. Correct --image"
    if reason == "ErrImageNeverPull":
        return f"the image {image} is not on the node, and imagePullPolicy Never forbids pulling it"
    if reason in IMAGE_REASONS:
        return _explain_image_pull(image, message)
    if reason in {"CreateContainerConfigError", "CreateContainerError", "RunContainerError"}:
        if match := NOT_FOUND.search(message):
            return _explain_not_found(match["kind"], match["name"])
        return f"container {container.stage} can't be started: {message or reason}"
    return message or None


def _explain_image_pull(image: str, message: str) -> str:
    problem = f"the image {image} can't be pulled"
    # Before Kubernetes 1.32, the back-off message does not include the cause.
    cause = PULL_ERROR_PREFIX.sub("", message).removeprefix(f"{image}: ")
    if cause:
        problem += f": {cause}"
    if ACCESS_DENIED.search(cause) or not cause:
        return (
            f"{problem}. Is the name correct and the image pushed (make image, then push)? "
            "A private registry requires spec.compute.imagePullSecrets"
        )
    return f"{problem}. Build and push it (make image, then push), or choose another with --image"


def _explain_failed_mount(message: str) -> str:
    if match := NOT_FOUND.search(message):
        return _explain_not_found(match["kind"], match["name"])
    if match := KEY_NOT_FOUND.search(message):
        return f"the ConfigMap has no key {match['key']}. Change spec.compute.extraCA.key, or add the key"
    return f"a volume can't be mounted: {one_line(message)}"


def _explain_not_found(kind: str, name: str) -> str:
    if kind == "secret":
        return f"Secret {name} not found in the namespace. Create it"
    return f"ConfigMap {name} not found in the namespace. Create it, or change spec.compute.extraCA"


def _explain_unscheduled(pod: KubernetesObject, events: list[KubernetesObject]) -> str | None:
    condition = find_condition(pod, "PodScheduled", "False")
    if condition is None:
        return None
    reason = _explain_unschedulable(pod, str(condition.get("message") or condition.get("reason") or ""))
    scaling = find_last_event(events, pod, "TriggeredScaleUp", "NotTriggerScaleUp", "FailedScaleUp", "Nominated")
    if scaling is None:
        return reason
    message = one_line(str(scaling.get("message") or ""))
    if scaling["reason"] == "NotTriggerScaleUp":
        cause = message.removeprefix("pod didn't trigger scale-up: ")
        return f"{reason}; the autoscaler does not add a node ({cause})"
    if scaling["reason"] == "FailedScaleUp":
        return f"{reason}; the autoscaler failed to add a node: {message}"
    return f"the autoscaler is adding a node, which takes minutes ({reason})"


INSUFFICIENT = "Insufficient "
# Spec keys that set how much of a resource is requested.
RESOURCE_KEYS = {
    GPU_RESOURCE: "spec.compute.gpus",
    "cpu": "spec.compute.cpu",
    "memory": "spec.compute.memory",
    "ephemeral-storage": "spec.compute.scratch",
}
# "0/5 nodes are available: 3 Insufficient nvidia.com/gpu, 2 node(s) had untolerated taint {a: b}. preemption: …"
UNSCHEDULABLE = re.compile(r"0/(?P<nodes>\d+) nodes are available: (?P<causes>.*)", re.DOTALL)
PREEMPTION = re.compile(r"\.? *(no new claims to deallocate, )?preemption: .*", re.DOTALL)
CAUSE = re.compile(r"(?P<count>\d+) (?P<cause>(?:[^,{]|\{[^}]*\})+)")


def _explain_unschedulable(pod: KubernetesObject, message: str) -> str:
    """Explain why no node fits a pod, and what to do.

    Args:
        pod: The pod.
        message: Message of its condition PodScheduled.

    Returns:
        One clause per cause, most fixable first; the message itself if its format is unknown.
    """
    match = UNSCHEDULABLE.search(message)
    if not match:
        return one_line(message)
    nodes = int(match["nodes"])
    causes = [
        (int(item["count"]), item["cause"].strip(" .")) for item in CAUSE.finditer(PREEMPTION.sub("", match["causes"]))
    ]
    insufficient = {
        cause.removeprefix(INSUFFICIENT): count for count, cause in causes if cause.startswith(INSUFFICIENT)
    }
    others = [_describe_cause(count, nodes, cause) for count, cause in causes if not cause.startswith(INSUFFICIENT)]
    # Missing resources matter more than nodes that never run GPU pods, such as control plane nodes.
    clauses = [_describe_insufficient(pod, insufficient, nodes)] if insufficient else []
    clauses += [*others, *_advice(insufficient, [cause for _, cause in causes])]
    return "; ".join(clauses) or one_line(message)


def _describe_insufficient(pod: KubernetesObject, insufficient: dict[str, int], nodes: int) -> str:
    resources = [
        f"{requested_amount(pod, resource) or 'enough'} free {resource} (insufficient on {count} of {nodes})"
        for resource, count in insufficient.items()
    ]
    return f"no node has {' and '.join(resources)}"


def _describe_cause(count: int, nodes: int, cause: str) -> str:
    subject, is_one = f"{count} of {nodes} nodes", count == 1
    if taint := re.match(r"node\(s\) had untolerated taint(?:\(s\)| (\{.*\}))?", cause):
        name = f"the taint {_format_taint(taint[1])}" if taint[1] else "a taint"
        return f"{subject} {'has' if is_one else 'have'} {name}, which the job does not tolerate"
    if "didn't match Pod's node affinity/selector" in cause:
        return f"{subject} {'does' if is_one else 'do'} not match spec.compute.nodeSelector or affinity"
    if "were unschedulable" in cause:
        return f"{subject} {'is' if is_one else 'are'} cordoned"
    if cause.startswith("Too many pods"):
        return f"{subject} {'has' if is_one else 'have'} reached the maximum number of pods"
    return f"{subject}: {cause}"


def _format_taint(text: str) -> str:
    """Convert `{nvidia.com/gpu: present}` to `nvidia.com/gpu=present`; the scheduler reports no effect."""
    key, _, value = text.strip("{}").partition(":")
    return f"{key}={value.strip()}" if value.strip() else key


def _advice(insufficient: Iterable[str], causes: list[str]) -> Iterator[str]:
    keys = [RESOURCE_KEYS[resource] for resource in insufficient if resource in RESOURCE_KEYS]
    if keys:
        yield f"wait until a node is free, or lower {' or '.join(keys)}"
    # If no resource is insufficient, the pod would wait forever: a taint or a label keeps it off the nodes.
    elif any("taint" in cause for cause in causes):
        yield "add a toleration to spec.compute.tolerations"
    elif any("node affinity/selector" in cause for cause in causes):
        yield "compare with kubectl get nodes --show-labels"
