"""Why no node takes a pod: the sentence of the scheduler, in words that say what to do."""

import re
from collections.abc import Iterable, Iterator

from topwork.cluster.objects import Manifest, one_line, requested

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


def unschedulable(pod: Manifest, message: str) -> str:
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


def _lacking(pod: Manifest, lacking: dict[str, int], nodes: int) -> str:
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
