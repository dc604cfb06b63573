"""Why a Job or its pod waits, and what to do; what is not known here is told as Kubernetes tells it."""

import re
from collections.abc import Iterable, Iterator

from topwork.clients.kubernetes import KubernetesObject
from topwork.cluster.names import QUEUE_LABEL
from topwork.cluster.status.objects import (
    ContainerFacts,
    condition,
    containers,
    event_time,
    label,
    last_event,
    name_of,
    one_line,
    requested,
)

IMAGE_REASONS = {"ErrImagePull", "ImagePullBackOff", "ImageInspectError", "RegistryUnavailable", "ErrImageNeverPull"}
PREPARING = ("FailedMount", "FailedAttachVolume", "FailedCreatePodSandBox", "Pulling", "Pulled")
"""Events on the way from a node to the first container: the newest one tells."""
REFUSED = re.compile(r"denied|unauthorized|authoriz|authentication|401|403|insufficient_scope")
BEFORE_THE_CAUSE = re.compile(
    r"^(rpc error: code = \w+ desc = |Back-off pulling image \"[^\"]*\"(: )?|ErrImagePull: |"
    r"failed to pull and unpack image \"[^\"]*\": |failed to resolve reference \"[^\"]*\": )+"
)
QUOTA = re.compile(
    r"exceeded quota: (?P<quota>\S+), requested: (?P<asked>\S+), used: (?P<used>\S+), limited: (?P<most>\S+)"
)
UNBOUNDED = re.compile(r"failed quota: (?P<quota>[^:]+): must specify (?P<what>.+)")
SECURITY = re.compile(r'violates PodSecurity "(?P<level>[^"]+)": (?P<what>.+)', re.DOTALL)
ACCOUNT = re.compile(r'serviceaccount "(?P<name>[^"]+)" not found|service account \S+/(?P<other>\S+) was not found')
PRIORITY = re.compile(r"no PriorityClass with name (?P<name>\S+) was found")
WEBHOOK = re.compile(r'admission webhook "(?P<name>[^"]+)" denied the request: (?P<what>.+)', re.DOTALL)
LIMIT_RANGE = re.compile(r"(?P<what>(maximum|minimum) \S+ usage per (Pod|Container) is .+)", re.DOTALL)
MISSING = re.compile(r'(?P<kind>configmap|secret) "(?P<name>[^"]+)" not found')
MISSING_KEY = re.compile(r"references non-existent config key: (?P<key>\S+)")


def job_reason(job: KubernetesObject, events: Iterable[KubernetesObject]) -> str | None:
    """Say why a Job has no pod.

    Args:
        job: The Job, without a pod that is not over.
        events: Events about it.

    Returns:
        The reason; None if there's nothing to say yet.
    """
    events = list(events)
    if job["spec"].get("suspend"):
        return _suspended(job, events)
    if (job.get("status") or {}).get("failed"):
        pause = "the next attempt follows after a pause, which Kubernetes doubles each time"
    else:
        pause = None
    # What was refused once and granted later is no news.
    last = last_event(events, job, "FailedCreate", "SuccessfulCreate")
    return creation_refused(str(last.get("message") or "")) if last and last["reason"] == "FailedCreate" else pause


def _suspended(job: KubernetesObject, events: list[KubernetesObject]) -> str:
    queue = label(job, QUEUE_LABEL)
    if queue is None:
        return f'suspended: resume it with kubectl patch job {name_of(job)} -p \'{{"spec":{{"suspend":false}}}}\''
    # Kueue tells the cause in events about its Workload, whose name begins with the Job's.
    about = f"job-{name_of(job)}-"
    told = [
        event
        for event in events
        if event.get("reason") in {"Pending", "QuotaReserved", "Inadmissible", "EvictedDueToPreempted", "Preempted"}
        and str((event.get("involvedObject") or {}).get("name")).startswith(about)
    ]
    waiting = f"waiting for room in the queue {queue}"
    newest = max(told, key=lambda event: str(event_time(event) or ""), default={})
    if message := one_line(str(newest.get("message") or "")):
        return f"{waiting}: {message}"
    return f"{waiting}; see kubectl get workloads, and kubectl get localqueue {queue}"


def creation_refused(message: str) -> str:
    """Say why the Job controller could not create a pod.

    Args:
        message: Message of its event FailedCreate.

    Returns:
        The reason and what to do.
    """
    if found := QUOTA.search(message):
        return (
            f"the quota {found['quota']} leaves no room: asked for {found['asked']}, used {found['used']}, "
            f"allowed {found['most']}. Wait, ask for less, or see kubectl describe quota {found['quota']}"
        )
    if found := UNBOUNDED.search(message):
        return f"the quota {found['quota']} wants every container to say {one_line(found['what'])}"
    if found := SECURITY.search(message):
        return (
            f"the namespace's Pod Security level {found['level']} refuses the pod: {one_line(found['what'])}. "
            "Was it changed by an admission webhook? topwork's own pods meet restricted"
        )
    if found := ACCOUNT.search(message):
        name = found["name"] or found["other"].rstrip(",")
        return f"there is no service account {name}. Create it, or change spec.compute.serviceAccountName"
    if found := PRIORITY.search(message):
        known = "see kubectl get priorityclass"
        return f"there is no PriorityClass {found['name']}. Change spec.compute.priorityClassName; {known}"
    if found := WEBHOOK.search(message):
        return f"the admission webhook {found['name']} refuses the pod: {one_line(found['what'])}"
    if found := LIMIT_RANGE.search(message):
        return f"a LimitRange refuses the pod: {one_line(found['what'])}. See kubectl describe limitrange"
    return one_line(message)


def pod_reason(pod: KubernetesObject, events: Iterable[KubernetesObject]) -> str | None:
    """Say why a pod whose first container has not started waits.

    Args:
        pod: The pod.
        events: Events about it.

    Returns:
        The reason; None if there's nothing to say yet.
    """
    events = list(events)
    for container in containers(pod):
        waiting = (container.status.get("state") or {}).get("waiting") or {}
        if told := _container_reason(container, waiting):
            return told
    if not pod["spec"].get("nodeName"):
        return _unscheduled(pod, events)
    last = last_event(events, pod, *PREPARING) or {}
    message = str(last.get("message") or "")
    if last.get("reason") in {"FailedMount", "FailedAttachVolume"}:
        return _unmounted(message)
    if last.get("reason") == "FailedCreatePodSandBox":
        return f"node {pod['spec']['nodeName']} can't set the pod up: {one_line(message)}"
    if last.get("reason") == "Pulling":
        return f"node {pod['spec']['nodeName']} pulls the image, which takes minutes the first time"
    return None


def _unscheduled(pod: KubernetesObject, events: list[KubernetesObject]) -> str | None:
    scheduled = condition(pod, "PodScheduled", "False")
    if scheduled is None:
        return None
    told = unschedulable(pod, str(scheduled.get("message") or scheduled.get("reason") or ""))
    scaling = last_event(events, pod, "TriggeredScaleUp", "NotTriggerScaleUp", "FailedScaleUp", "Nominated")
    if scaling is None:
        return told
    if scaling["reason"] == "NotTriggerScaleUp":
        cause = one_line(str(scaling.get("message") or "")).removeprefix("pod didn't trigger scale-up: ")
        return f"{told}; the autoscaler adds no node ({cause})"
    if scaling["reason"] == "FailedScaleUp":
        return f"{told}; the autoscaler failed to add a node: {one_line(str(scaling.get('message') or ''))}"
    return f"the autoscaler is adding a node, which takes minutes ({told})"


def _container_reason(container: ContainerFacts, waiting: KubernetesObject) -> str | None:
    reason = str(waiting.get("reason") or "")
    message = one_line(str(waiting.get("message") or ""))
    image = container.spec["image"]
    if reason == "InvalidImageName":
        return f"{image} is no valid name of an image. Correct --image"
    if reason == "ErrImageNeverPull":
        return f"the image {image} is not on the node, and imagePullPolicy Never forbids pulling it"
    if reason in IMAGE_REASONS:
        return _image_reason(image, message)
    if reason in {"CreateContainerConfigError", "CreateContainerError", "RunContainerError"}:
        if found := MISSING.search(message):
            return _missing(found["kind"], found["name"])
        return f"{container.stage} can't be started: {message or reason}"
    # PodInitializing and ContainerCreating are the way of things.
    return message or None if reason not in {"PodInitializing", "ContainerCreating"} else None


def _image_reason(image: str, message: str) -> str:
    told = f"the image {image} can't be pulled"
    # Kubernetes' own back-off says no more than that it failed; since 1.32 the cause follows.
    cause = BEFORE_THE_CAUSE.sub("", message).removeprefix(f"{image}: ")
    if cause:
        told += f": {cause}"
    if REFUSED.search(cause) or not cause:
        return (
            f"{told}. Is the name right and the image pushed (make image, then push)? "
            "A private registry needs spec.compute.imagePullSecrets"
        )
    return f"{told}. Build and push it (make image, then push), or name another with --image"


def _unmounted(message: str) -> str:
    if found := MISSING.search(message):
        return _missing(found["kind"], found["name"])
    if found := MISSING_KEY.search(message):
        return f"the ConfigMap has no key {found['key']}. Change spec.compute.extraCA.key, or add it"
    return f"a volume can't be mounted: {one_line(message)}"


def _missing(kind: str, name: str) -> str:
    if kind == "secret":
        return f"there is no Secret {name} in the namespace. Create it"
    return f"there is no ConfigMap {name} in the namespace. Create it, or change spec.compute.extraCA"


GPU = "nvidia.com/gpu"
LACKING = "Insufficient "
# The key of the spec by which the amount of a resource is asked for.
KEYS = {
    GPU: "spec.compute.gpus",
    "cpu": "spec.compute.cpu",
    "memory": "spec.compute.memory",
    "ephemeral-storage": "spec.compute.scratch",
}
# "0/5 nodes are available: 3 Insufficient nvidia.com/gpu, 2 node(s) had untolerated taint {a: b}. preemption: …"
SENTENCE = re.compile(r"0/(?P<nodes>\d+) nodes are available: (?P<causes>.*)", re.DOTALL)
AFTERWARDS = re.compile(r"\.? *(no new claims to deallocate, )?preemption: .*", re.DOTALL)
CAUSE = re.compile(r"(?P<count>\d+) (?P<what>(?:[^,{]|\{[^}]*\})+)")


def unschedulable(pod: KubernetesObject, message: str) -> str:
    """Say why no node takes a pod, and what to do.

    Args:
        pod: The pod.
        message: Message of its condition PodScheduled.

    Returns:
        A sentence for each cause, the one that a user can do most about first; the message as it is where it's
        of another form.
    """
    found = SENTENCE.search(message)
    if not found:
        return one_line(message)
    nodes = int(found["nodes"])
    causes = [
        (int(cause["count"]), cause["what"].strip(" ."))
        for cause in CAUSE.finditer(AFTERWARDS.sub("", found["causes"]))
    ]
    lacking = {what.removeprefix(LACKING): count for count, what in causes if what.startswith(LACKING)}
    told = [_cause(count, nodes, what) for count, what in causes if not what.startswith(LACKING)]
    # What is lacking says more than the nodes that were never meant for GPUs, such as the control plane's.
    first = [_lacking(pod, lacking, nodes)] if lacking else []
    advice = list(_advice(lacking, [what for _, what in causes]))
    return "; ".join(first + told + advice) or one_line(message)


def _lacking(pod: KubernetesObject, lacking: dict[str, int], nodes: int) -> str:
    wanted = []
    for resource, count in lacking.items():
        amount = requested(pod, resource)
        wanted.append(f"{amount or 'enough'} free {resource} ({count} of {nodes} {_verb(count, 'lacks', 'lack')} it)")
    return f"no node has {' and '.join(wanted)}"


def _cause(count: int, nodes: int, what: str) -> str:
    of = f"{count} of {nodes}"
    if taint := re.match(r"node\(s\) had untolerated taint(?:\(s\)| (\{.*\}))?", what):
        named = f"the taint {_taint(taint[1])}" if taint[1] else "a taint"
        return f"{of} {_verb(count, 'has', 'have')} {named}, which the job does not tolerate"
    if "didn't match Pod's node affinity/selector" in what:
        verb = _verb(count, "does", "do")
        return f"{of} {verb} not have the labels that spec.compute.nodeSelector or affinity want"
    if "were unschedulable" in what:
        return f"{of} {_verb(count, 'is', 'are')} cordoned"
    if what.startswith("Too many pods"):
        return f"{of} {_verb(count, 'has', 'have')} no room for another pod"
    return f"{of}: {what}"


def _verb(count: int, singular: str, plural: str) -> str:
    return singular if count == 1 else plural


def _taint(text: str) -> str:
    """Turn `{nvidia.com/gpu: present}` into `nvidia.com/gpu=present`; Kubernetes names no effect."""
    key, _, value = text.strip("{}").partition(":")
    return f"{key}={value.strip()}" if value.strip() else key


def _advice(lacking: Iterable[str], causes: list[str]) -> Iterator[str]:
    keys = [KEYS[resource] for resource in lacking if resource in KEYS]
    if keys:
        yield f"wait until one is free, or lower {' or '.join(keys)}"
    # Where nothing is lacking the pod would wait for ever: a taint or a label is in the way.
    elif any("taint" in what for what in causes):
        yield "add the taint to spec.compute.tolerations"
    elif any("node affinity/selector" in what for what in causes):
        yield "compare with kubectl get nodes --show-labels"
