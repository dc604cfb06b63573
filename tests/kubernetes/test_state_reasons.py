"""Why a run waits, in words that say what to do, from the sentences of real clusters."""

import pytest
from states import (
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
from topwork.cluster.status.run_state import run_state

NO_PLACE = "no node has 2 free nvidia.com/gpu (3 of 5 lack it); 2 of 5 have the taint "
NO_PLACE += "node-role.kubernetes.io/control-plane, which the job does not tolerate; wait until one is free, or lower "
NO_PLACE += "spec.compute.gpus"


def reason_of(wanted, pods=(), events=()):
    return run_state(RunObjects([wanted], list(pods), list(events))).reason


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (NO_GPUS, NO_PLACE),
        (
            "0/1 nodes are available: 1 Insufficient nvidia.com/gpu. no new claims to deallocate, preemption: 0/1 "
            "nodes are available: 1 No preemption victims found for incoming pod.",
            "no node has 2 free nvidia.com/gpu (1 of 1 lacks it); wait until one is free, or lower spec.compute.gpus",
        ),
        (
            "0/4 nodes are available: 1 node(s) had untolerated taint(s), 3 Insufficient memory, 1 Insufficient cpu. "
            "preemption: 0/4 nodes are available: 4 Preemption is not helpful for scheduling.",
            "no node has 32Gi free memory (3 of 4 lack it) and 4 free cpu (1 of 4 lacks it); 1 of 4 has a taint, which "
            "the job does not tolerate; wait until one is free, or lower spec.compute.memory or spec.compute.cpu",
        ),
        (
            "0/3 nodes are available: 3 node(s) had untolerated taint {nvidia.com/gpu: present}. preemption: 0/3 nodes "
            "are available: 3 Preemption is not helpful for scheduling.",
            "3 of 3 have the taint nvidia.com/gpu=present, which the job does not tolerate; add the taint to "
            "spec.compute.tolerations",
        ),
        (
            "0/3 nodes are available: 3 node(s) didn't match Pod's node affinity/selector. preemption: 0/3 nodes are "
            "available: 3 Preemption is not helpful for scheduling.",
            "3 of 3 do not have the labels that spec.compute.nodeSelector or affinity want; compare with kubectl get "
            "nodes --show-labels",
        ),
        (
            "0/2 nodes are available: 1 node(s) were unschedulable, 1 Too many pods.",
            "1 of 2 is cordoned; 1 of 2 has no room for another pod",
        ),
        (
            "0/2 nodes are available: 2 node(s) had something that is new. preemption: not eligible.",
            "2 of 2: node(s) had something that is new",
        ),
        ("no nodes available to schedule pods", "no nodes available to schedule pods"),
    ],
    ids=["GPUs", "one node", "several", "taint", "labels", "cordoned", "unknown cause", "unknown sentence"],
)
def test_a_pod_without_a_node_says_what_is_lacking_and_what_to_do(message, reason):
    assert reason_of(job(), [pending_pod(message)]) == reason


@pytest.mark.parametrize(
    ("scaling", "message", "reason"),
    [
        (
            "TriggeredScaleUp",
            "pod triggered scale-up: [{gpu-pool 0->1 (max: 4)}]",
            f"the autoscaler is adding a node, which takes minutes ({NO_PLACE})",
        ),
        (
            "NotTriggerScaleUp",
            "pod didn't trigger scale-up: 1 max node group size reached",
            f"{NO_PLACE}; the autoscaler adds no node (1 max node group size reached)",
        ),
        (
            "FailedScaleUp",
            "Scale-up failed: quota of GPUs exceeded",
            f"{NO_PLACE}; the autoscaler failed to add a node: Scale-up failed: quota of GPUs exceeded",
        ),
        (
            "Nominated",
            "Pod should schedule on: nodeclaim/gpu-x7k2p",
            f"the autoscaler is adding a node, which takes minutes ({NO_PLACE})",
        ),
    ],
)
def test_what_the_autoscaler_does_is_told(scaling, message, reason):
    waits = pending_pod(NO_GPUS)
    events = [
        event(waits, "FailedScheduling", NO_GPUS, 3),
        event(waits, "NotTriggerScaleUp", "pod didn't trigger scale-up: something earlier", 4),
        event(waits, scaling, message, 30, kind="Normal"),
    ]
    assert reason_of(job(), [waits], events) == reason


NOT_FOUND = (
    f'rpc error: code = NotFound desc = failed to pull and unpack image "{IMAGE}": failed to resolve reference '
    f'"{IMAGE}": {IMAGE}: not found'
)
DENIED = (
    f'rpc error: code = Unknown desc = failed to pull and unpack image "{IMAGE}": failed to resolve reference '
    f'"{IMAGE}": pull access denied, repository does not exist or may require authorization: server message: '
    "insufficient_scope: authorization failed"
)
ASK = "Is the name right and the image pushed (make image, then push)? A private registry needs "
ASK += "spec.compute.imagePullSecrets"


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        (
            waiting("ErrImagePull", NOT_FOUND),
            f"the image {IMAGE} can't be pulled: not found. Build and push it (make image, then push), or name another "
            "with --image",
        ),
        (
            waiting("ImagePullBackOff", f'Back-off pulling image "{IMAGE}": ErrImagePull: {DENIED}'),
            f"the image {IMAGE} can't be pulled: pull access denied, repository does not exist or may require "
            f"authorization: server message: insufficient_scope: authorization failed. {ASK}",
        ),
        (waiting("ImagePullBackOff", f'Back-off pulling image "{IMAGE}"'), f"the image {IMAGE} can't be pulled. {ASK}"),
        (
            waiting("InvalidImageName", "Failed to apply default image tag"),
            f"{IMAGE} is no valid name of an image. Correct --image",
        ),
        (
            waiting("ErrImageNeverPull", f'Container image "{IMAGE}" is not present with pull policy of Never'),
            f"the image {IMAGE} is not on the node, and imagePullPolicy Never forbids pulling it",
        ),
        (
            waiting("CreateContainerConfigError", 'configmap "corp-ca" not found'),
            "there is no ConfigMap corp-ca in the namespace. Create it, or change spec.compute.extraCA",
        ),
        (
            waiting("CreateContainerConfigError", 'secret "s3" not found'),
            "there is no Secret s3 in the namespace. Create it",
        ),
        (
            waiting("CreateContainerConfigError", "container has runAsNonRoot and image will run as root"),
            "pull can't be started: container has runAsNonRoot and image will run as root",
        ),
        (waiting("SomethingNew", "A sentence\nof a later Kubernetes."), "A sentence of a later Kubernetes"),
        (waiting("ContainerCreating"), None),
    ],
)
def test_a_container_that_can_not_start_says_why(state, reason):
    assert reason_of(job(), [pod({"pull": state}, phase="Pending")]) == reason


@pytest.mark.parametrize(
    ("kind", "message", "reason"),
    [
        (
            "FailedMount",
            'MountVolume.SetUp failed for volume "ca" : configmap "corp-ca" not found',
            "there is no ConfigMap corp-ca in the namespace. Create it, or change spec.compute.extraCA",
        ),
        (
            "FailedMount",
            'MountVolume.SetUp failed for volume "ca" : configmap references non-existent config key: ca.crt',
            "the ConfigMap has no key ca.crt. Change spec.compute.extraCA.key, or add it",
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
            'node gpu-1 can\'t set the pod up: Failed to create pod sandbox: plugin type="calico" failed',
        ),
        ("Pulling", f'Pulling image "{IMAGE}"', "node gpu-1 pulls the image, which takes minutes the first time"),
    ],
)
def test_what_a_node_can_not_do_yet_is_told(kind, message, reason):
    new = pod({"pull": waiting("ContainerCreating")}, phase="Pending")
    assert reason_of(job(), [new], [event(new, "Pulled", "before", 3), event(new, kind, message)]) == reason


def test_a_mount_that_failed_first_and_worked_later_is_no_news():
    new = pod({"pull": waiting("ContainerCreating")}, phase="Pending")
    events = [
        event(new, "FailedMount", 'MountVolume.SetUp failed for volume "job" : configmap "x" not found', 3),
        event(new, "Pulled", "Container image already present on machine", 9, kind="Normal"),
    ]
    assert reason_of(job(), [new], events) is None


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (
            QUOTA,
            "the quota gpus leaves no room: asked for requests.nvidia.com/gpu=2, used requests.nvidia.com/gpu=7, "
            "allowed requests.nvidia.com/gpu=8. Wait, ask for less, or see kubectl describe quota gpus",
        ),
        (
            'Error creating: pods "x-" is forbidden: failed quota: compute: must specify limits.cpu for: pull',
            "the quota compute wants every container to say limits.cpu for: pull",
        ),
        (
            POD_SECURITY,
            "the namespace's Pod Security level restricted:latest refuses the pod: allowPrivilegeEscalation != false "
            '(container "istio-init" must set securityContext.allowPrivilegeEscalation=false). Was it changed by an '
            "admission webhook? topwork's own pods meet restricted",
        ),
        (
            'Error creating: pods "x-" is forbidden: error looking up service account team-a/trainer: serviceaccount '
            '"trainer" not found',
            "there is no service account trainer. Create it, or change spec.compute.serviceAccountName",
        ),
        (
            'Error creating: pods "x-" is forbidden: no PriorityClass with name urgent was found',
            "there is no PriorityClass urgent. Change spec.compute.priorityClassName; see kubectl get priorityclass",
        ),
        (
            'Error creating: admission webhook "validate.kyverno.svc-fail" denied the request: policy says\nno.',
            "the admission webhook validate.kyverno.svc-fail refuses the pod: policy says no",
        ),
        (
            'Error creating: pods "x-" is forbidden: maximum memory usage per Container is 8Gi, but limit is 32Gi',
            "a LimitRange refuses the pod: maximum memory usage per Container is 8Gi, but limit is 32Gi. See kubectl "
            "describe limitrange",
        ),
        ("Error creating: something\nnew.", "Error creating: something new"),
    ],
    ids=["quota", "quota wants more", "Pod Security", "account", "priority", "webhook", "LimitRange", "unknown"],
)
def test_a_pod_that_was_not_created_says_why(message, reason):
    wanted = job()
    assert reason_of(wanted, events=[event(wanted, "FailedCreate", message)]) == reason


def test_a_pod_that_was_created_at_last_has_no_quota_as_its_reason():
    wanted = job()
    events = [
        event(wanted, "FailedCreate", QUOTA, 3),
        event(wanted, "SuccessfulCreate", f"Created pod: {RUN}-abcde", 60, kind="Normal"),
    ]
    assert reason_of(wanted, events=events) is None


def test_kueue_says_what_its_queue_lacks():
    suspended = suspended_job("team-a")
    workload = {"kind": "Workload", "metadata": {"name": f"job-{RUN}-1f2e3", "uid": "w"}}
    other = {"kind": "Workload", "metadata": {"name": "job-other-1f2e3", "uid": "v"}}
    lacking = "couldn't assign flavors to pod set main: insufficient unused quota for nvidia.com/gpu in flavor h100, 2 "
    events = [
        event(workload, "Pending", "something earlier", 3),
        event(workload, "Pending", f"{lacking}more needed", 30),
        event(other, "Pending", "of another job", 60),
    ]
    assert reason_of(suspended, events=events) == f"waiting for room in the queue team-a: {lacking}more needed"


def test_a_job_that_somebody_suspended_says_how_to_resume_it():
    assert reason_of(suspended_job(None)) == (
        f'suspended: resume it with kubectl patch job {RUN} -p \'{{"spec":{{"suspend":false}}}}\''
    )
