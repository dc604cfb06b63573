"""Explanations of pending runs, from messages of real clusters."""

import pytest
from sample_objects import (
    IMAGE,
    NO_GPUS,
    POD_SECURITY,
    QUOTA,
    RUN,
    event,
    job,
    pending_pod,
    pod,
    suspended_job,
    waiting,
)

from topwork.cluster.status.objects import RunObjects
from topwork.cluster.status.run_status import read_run_status

UNSCHEDULABLE = "no node has 2 free nvidia.com/gpu (insufficient on 3 of 5); 2 of 5 nodes have the taint "
UNSCHEDULABLE += "node-role.kubernetes.io/control-plane, which the job does not tolerate; wait until a node is free, "
UNSCHEDULABLE += "or lower spec.compute.gpus"


def reason_of(job_object, pods=(), events=()):
    return read_run_status(RunObjects([job_object], list(pods), list(events))).reason


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (NO_GPUS, UNSCHEDULABLE),
        (
            "0/1 nodes are available: 1 Insufficient nvidia.com/gpu. no new claims to deallocate, preemption: 0/1 "
            "nodes are available: 1 No preemption victims found for incoming pod.",
            "no node has 2 free nvidia.com/gpu (insufficient on 1 of 1); wait until a node is free, or lower "
            "spec.compute.gpus",
        ),
        (
            "0/4 nodes are available: 1 node(s) had untolerated taint(s), 3 Insufficient memory, 1 Insufficient cpu. "
            "preemption: 0/4 nodes are available: 4 Preemption is not helpful for scheduling.",
            "no node has 32Gi free memory (insufficient on 3 of 4) and 4 free cpu (insufficient on 1 of 4); 1 of 4 "
            "nodes has a taint, which the job does not tolerate; wait until a node is free, or lower "
            "spec.compute.memory or spec.compute.cpu",
        ),
        (
            "0/3 nodes are available: 3 node(s) had untolerated taint {nvidia.com/gpu: present}. preemption: 0/3 nodes "
            "are available: 3 Preemption is not helpful for scheduling.",
            "3 of 3 nodes have the taint nvidia.com/gpu=present, which the job does not tolerate; add a toleration to "
            "spec.compute.tolerations",
        ),
        (
            "0/3 nodes are available: 3 node(s) didn't match Pod's node affinity/selector. preemption: 0/3 nodes are "
            "available: 3 Preemption is not helpful for scheduling.",
            "3 of 3 nodes do not match spec.compute.nodeSelector or affinity; compare with kubectl get nodes "
            "--show-labels",
        ),
        (
            "0/2 nodes are available: 1 node(s) were unschedulable, 1 Too many pods.",
            "1 of 2 nodes is cordoned; 1 of 2 nodes has reached the maximum number of pods",
        ),
        (
            "0/2 nodes are available: 2 node(s) had something that is new. preemption: not eligible.",
            "2 of 2 nodes: node(s) had something that is new",
        ),
        ("no nodes available to schedule pods", "no nodes available to schedule pods"),
    ],
    ids=["GPUs", "one node", "several", "taint", "labels", "cordoned", "unknown cause", "unknown message"],
)
def test_unschedulable_pod_explains_what_is_insufficient_and_what_to_do(message, reason):
    assert reason_of(job(), [pending_pod(message)]) == reason


@pytest.mark.parametrize(
    ("event_reason", "message", "reason"),
    [
        (
            "TriggeredScaleUp",
            "pod triggered scale-up: [{gpu-pool 0->1 (max: 4)}]",
            f"the autoscaler is adding a node, which takes minutes ({UNSCHEDULABLE})",
        ),
        (
            "NotTriggerScaleUp",
            "pod didn't trigger scale-up: 1 max node group size reached",
            f"{UNSCHEDULABLE}; the autoscaler does not add a node (1 max node group size reached)",
        ),
        (
            "FailedScaleUp",
            "Scale-up failed: quota of GPUs exceeded",
            f"{UNSCHEDULABLE}; the autoscaler failed to add a node: Scale-up failed: quota of GPUs exceeded",
        ),
        (
            "Nominated",
            "Pod should schedule on: nodeclaim/gpu-x7k2p",
            f"the autoscaler is adding a node, which takes minutes ({UNSCHEDULABLE})",
        ),
    ],
)
def test_autoscaler_events_are_explained(event_reason, message, reason):
    pending = pending_pod(NO_GPUS)
    events = [
        event(pending, "FailedScheduling", NO_GPUS, 3),
        event(pending, "NotTriggerScaleUp", "pod didn't trigger scale-up: something earlier", 4),
        event(pending, event_reason, message, 30, kind="Normal"),
    ]
    assert reason_of(job(), [pending], events) == reason


NOT_FOUND = (
    f'rpc error: code = NotFound desc = failed to pull and unpack image "{IMAGE}": failed to resolve reference '
    f'"{IMAGE}": {IMAGE}: not found'
)
DENIED = (
    f'rpc error: code = Unknown desc = failed to pull and unpack image "{IMAGE}": failed to resolve reference '
    f'"{IMAGE}": pull access denied, repository does not exist or may require authorization: server message: '
    "insufficient_scope: authorization failed"
)
ADVICE = "Is the name correct and the image pushed (make image, then push)? A private registry requires "
ADVICE += "spec.compute.imagePullSecrets"


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        (
            waiting("ErrImagePull", NOT_FOUND),
            f"the image {IMAGE} can't be pulled: not found. Build and push it (make image, then push), or choose "
            "another with --image",
        ),
        (
            waiting("ImagePullBackOff", f'Back-off pulling image "{IMAGE}": ErrImagePull: {DENIED}'),
            f"the image {IMAGE} can't be pulled: pull access denied, repository does not exist or may require "
            f"authorization: server message: insufficient_scope: authorization failed. {ADVICE}",
        ),
        (
            waiting("ImagePullBackOff", f'Back-off pulling image "{IMAGE}"'),
            f"the image {IMAGE} can't be pulled. {ADVICE}",
        ),
        (
            waiting("InvalidImageName", "Failed to apply default image tag"),
            f"{IMAGE} is not a valid image name. Correct --image",
        ),
        (
            waiting("ErrImageNeverPull", f'Container image "{IMAGE}" is not present with pull policy of Never'),
            f"the image {IMAGE} is not on the node, and imagePullPolicy Never forbids pulling it",
        ),
        (
            waiting("CreateContainerConfigError", 'configmap "corp-ca" not found'),
            "ConfigMap corp-ca not found in the namespace. Create it, or change spec.compute.extraCA",
        ),
        (
            waiting("CreateContainerConfigError", 'secret "s3" not found'),
            "Secret s3 not found in the namespace. Create it",
        ),
        (
            waiting("CreateContainerConfigError", "container has runAsNonRoot and image will run as root"),
            "container pull can't be started: container has runAsNonRoot and image will run as root",
        ),
        (waiting("SomethingNew", "A sentence\nof a later Kubernetes."), "A sentence of a later Kubernetes"),
        (waiting("ContainerCreating"), None),
    ],
)
def test_waiting_container_is_explained(state, reason):
    assert reason_of(job(), [pod({"pull": state}, phase="Pending")]) == reason


@pytest.mark.parametrize(
    ("event_reason", "message", "reason"),
    [
        (
            "FailedMount",
            'MountVolume.SetUp failed for volume "ca" : configmap "corp-ca" not found',
            "ConfigMap corp-ca not found in the namespace. Create it, or change spec.compute.extraCA",
        ),
        (
            "FailedMount",
            'MountVolume.SetUp failed for volume "ca" : configmap references non-existent config key: ca.crt',
            "the ConfigMap has no key ca.crt. Change spec.compute.extraCA.key, or add the key",
        ),
        (
            "FailedMount",
            "Unable to attach or mount volumes: unmounted volumes=[scratch]: timed out waiting for the condition",
            "a volume can't be mounted: Unable to attach or mount volumes: unmounted volumes=[scratch]: timed out "
            "waiting for the condition",
        ),
        (
            "FailedCreatePodSandBox",
            'Failed to create pod sandbox: plugin type="calico" failed',
            'node gpu-1 can\'t start the pod: Failed to create pod sandbox: plugin type="calico" failed',
        ),
        (
            "Pulling",
            f'Pulling image "{IMAGE}"',
            "node gpu-1 is pulling the image, which can take minutes the first time",
        ),
    ],
)
def test_startup_events_of_the_node_are_explained(event_reason, message, reason):
    starting = pod({"pull": waiting("ContainerCreating")}, phase="Pending")
    events = [event(starting, "Pulled", "before", 3), event(starting, event_reason, message)]
    assert reason_of(job(), [starting], events) == reason


def test_failed_mount_that_succeeded_later_is_ignored():
    starting = pod({"pull": waiting("ContainerCreating")}, phase="Pending")
    events = [
        event(starting, "FailedMount", 'MountVolume.SetUp failed for volume "job" : configmap "x" not found', 3),
        event(starting, "Pulled", "Container image already present on machine", 9, kind="Normal"),
    ]
    assert reason_of(job(), [starting], events) is None


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (
            QUOTA,
            "exceeded quota gpus: requested requests.nvidia.com/gpu=2, used requests.nvidia.com/gpu=7, limited to "
            "requests.nvidia.com/gpu=8. Wait, request less, or see kubectl describe quota gpus",
        ),
        (
            'Error creating: pods "x-" is forbidden: failed quota: compute: must specify limits.cpu for: pull',
            "the quota compute requires every container to specify limits.cpu for: pull",
        ),
        (
            POD_SECURITY,
            "the pod violates the Pod Security level restricted:latest of the namespace: allowPrivilegeEscalation != "
            'false (container "istio-init" must set securityContext.allowPrivilegeEscalation=false). Did an admission '
            "webhook change the pod? Pods of topwork meet the level restricted",
        ),
        (
            'Error creating: pods "x-" is forbidden: error looking up service account team-a/trainer: serviceaccount '
            '"trainer" not found',
            "ServiceAccount trainer not found. Create it, or change spec.compute.serviceAccountName",
        ),
        (
            'Error creating: pods "x-" is forbidden: no PriorityClass with name urgent was found',
            "PriorityClass urgent not found. Change spec.compute.priorityClassName; see kubectl get priorityclass",
        ),
        (
            'Error creating: admission webhook "validate.kyverno.svc-fail" denied the request: policy says\nno.',
            "the admission webhook validate.kyverno.svc-fail denied the pod: policy says no",
        ),
        (
            'Error creating: pods "x-" is forbidden: maximum memory usage per Container is 8Gi, but limit is 32Gi',
            "a LimitRange rejects the pod: maximum memory usage per Container is 8Gi, but limit is 32Gi. See kubectl "
            "describe limitrange",
        ),
        ("Error creating: something\nnew.", "Error creating: something new"),
    ],
    ids=[
        "quota",
        "quota of unspecified resource",
        "Pod Security",
        "account",
        "priority",
        "webhook",
        "LimitRange",
        "unknown",
    ],
)
def test_failed_pod_creation_is_explained(message, reason):
    job_object = job()
    assert reason_of(job_object, events=[event(job_object, "FailedCreate", message)]) == reason


def test_failed_pod_creation_that_succeeded_later_is_ignored():
    job_object = job()
    events = [
        event(job_object, "FailedCreate", QUOTA, 3),
        event(job_object, "SuccessfulCreate", f"Created pod: {RUN}-abcde", 60, kind="Normal"),
    ]
    assert reason_of(job_object, events=events) is None


def test_kueue_workload_event_is_the_reason():
    suspended = suspended_job("team-a")
    workload = {"kind": "Workload", "metadata": {"name": f"job-{RUN}-1f2e3", "uid": "w"}}
    other = {"kind": "Workload", "metadata": {"name": "job-other-1f2e3", "uid": "v"}}
    quota_message = (
        "couldn't assign flavors to pod set main: insufficient unused quota for nvidia.com/gpu in flavor h100, 2 "
    )
    events = [
        event(workload, "Pending", "something earlier", 3),
        event(workload, "Pending", f"{quota_message}more needed", 30),
        event(other, "Pending", "of another job", 60),
    ]
    assert reason_of(suspended, events=events) == f"waiting for quota in the queue team-a: {quota_message}more needed"


def test_suspended_job_without_queue_explains_how_to_resume_it():
    assert reason_of(suspended_job(None)) == (
        f'suspended: resume it with kubectl patch job {RUN} -p \'{{"spec":{{"suspend":false}}}}\''
    )
