"""Explanations of failed and disrupted pods, from messages of real clusters."""

import pytest
from sample_objects import PULLED, disruption, job, pod, preemption, terminated

from topwork.cluster.status.objects import RunObjects
from topwork.cluster.status.run_status import read_run_status

PREEMPTED = "preempted by the scheduler in favor of a pod with higher priority"


def read_attempts(job_object, pods):
    return read_run_status(RunObjects([job_object], pods)).attempts


@pytest.mark.parametrize(
    ("states", "more", "code", "error"),
    [
        (
            {"transfer": terminated(137, reason="OOMKilled")},
            {},
            137,
            "container transfer exceeded its memory limit of 32Gi and was OOM-killed. Raise spec.compute.memory",
        ),
        (
            {"transfer": terminated(137)},
            {},
            137,
            "killed (SIGKILL): the node ran out of memory, or the grace period ended before the checkpoint was "
            "uploaded",
        ),
        (
            {"transfer": terminated(135)},
            {},
            135,
            "bus error (SIGBUS), most likely because /dev/shm is full. Raise spec.compute.sharedMemory",
        ),
        ({"transfer": terminated(139)}, {}, 139, "crashed (segmentation fault)"),
        (
            {"transfer": terminated(1, "Traceback (most recent call last):\n  File …\nKeyError: 'labels'\n")},
            {},
            1,
            "KeyError: 'labels'",
        ),
        (
            {"transfer": terminated(1, '{"time": "2026", "message": "failed", "error": "it broke."}\n')},
            {},
            1,
            "it broke",
        ),
        ({"transfer": terminated(1)}, {}, 1, "exit code 1 without a message"),
        (
            {
                "transfer": terminated(
                    128,
                    'failed to create containerd task: exec: "tini": executable file not found in $PATH: unknown',
                    "StartError",
                )
            },
            {},
            128,
            'container transfer could not be started: failed to create containerd task: exec: "tini": executable file '
            "not found in $PATH: unknown. Is registry.example.com/topwork:1-gpu a topwork image?",
        ),
        (
            {"transfer": terminated(137, "The container could not be located", "ContainerStatusUnknown")},
            {},
            137,
            "the node lost the status of container transfer",
        ),
        (
            {"transfer": terminated(137)},
            {"reason": "Evicted", "message": 'Usage of EmptyDir volume "scratch" exceeds the limit "50Gi". '},
            137,
            "evicted: the volume scratch exceeded its limit of 50Gi. Raise spec.compute.scratch",
        ),
        (
            {"transfer": terminated(137)},
            {"reason": "Evicted", "message": 'Usage of EmptyDir volume "shm" exceeds the limit "2Gi". '},
            137,
            "evicted: the volume shm exceeded its limit of 2Gi. Raise spec.compute.sharedMemory",
        ),
        (
            {},
            {
                "reason": "UnexpectedAdmissionError",
                "message": "Pod was rejected: Allocate failed due to requested number "
                "of devices unavailable for nvidia.com/gpu. Requested: 2, Available: 0, which is unexpected",
            },
            None,
            "node gpu-1 rejected or terminated the pod (UnexpectedAdmissionError): Pod was rejected: Allocate failed "
            "due to requested number of devices unavailable for nvidia.com/gpu. Requested: 2, Available: 0, which is "
            "unexpected",
        ),
    ],
    ids=[
        "out of memory",
        "killed",
        "bus error",
        "crashed",
        "traceback",
        "log line",
        "no message",
        "wrong image",
        "status unknown",
        "scratch full",
        "shared memory full",
        "no GPU left",
    ],
)
def test_failed_pod_has_an_error_and_is_counted(states, more, code, error):
    (attempt,) = read_attempts(job(status={"failed": 1}), [pod(PULLED | states, phase="Failed", **more)])
    assert (attempt.state, attempt.exit_code, attempt.error, attempt.counted) == ("failed", code, error, True)


@pytest.mark.parametrize(
    ("condition", "more", "error"),
    [
        (preemption(), {}, PREEMPTED),
        (
            disruption("DeletionByTaintManager", "Taint manager: deleting due to NoExecute taint"),
            {},
            "deleted from node gpu-1, which got a taint that the job does not tolerate",
        ),
        (
            disruption("EvictionByEvictionAPI", "Eviction API: evicting"),
            {},
            "evicted from node gpu-1, which is being drained",
        ),
        (
            disruption("DeletionByPodGC", "PodGC: node no longer exists"),
            {},
            "deleted because node gpu-1 no longer exists",
        ),
        (
            disruption(
                "TerminationByKubelet",
                "The node was low on resource: memory. Threshold quantity: 100Mi, available: 80Mi. Container transfer "
                "was using 30Gi, request is 32Gi, has larger consumption of memory. ",
            ),
            {"reason": "Evicted"},
            "terminated by node gpu-1: The node was low on resource: memory. Threshold quantity: 100Mi, available: "
            "80Mi. Container transfer was using 30Gi, request is 32Gi, has larger consumption of memory",
        ),
        (
            disruption("TerminationByKubelet", "Pod was terminated in response to imminent node shutdown."),
            {"reason": "Terminated"},
            "terminated by node gpu-1: Pod was terminated in response to imminent node shutdown",
        ),
        (
            disruption("DeletionByDeviceTaintManager", "Device Taint manager: deleting due to NoExecute taint"),
            {},
            "terminated by node gpu-1: Device Taint manager: deleting due to NoExecute taint",
        ),
    ],
    ids=["preempted", "taint", "drained", "node gone", "memory pressure", "shutdown", "unknown reason"],
)
def test_disrupted_pod_has_an_error_and_is_not_counted(condition, more, error):
    disrupted = pod(PULLED | {"transfer": terminated(137)}, phase="Failed", conditions=(condition,), **more)
    (attempt,) = read_attempts(job(), [disrupted])
    assert (attempt.error, attempt.counted) == (error, False)
