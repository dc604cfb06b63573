"""Explanations of failed and disrupted pods, from messages of real clusters."""

import pytest
from sample_objects import (
    PULLED,
    disruption,
    done,
    failed,
    failed_by_policy,
    failed_job,
    job,
    pod,
    preemption,
    terminated,
    waiting,
)

from topwork.cluster.status.objects import RunObjects, parse_quantity, requested_amount
from topwork.cluster.status.run_status import read_run_status

PREEMPTED = "preempted by the scheduler in favor of a pod with higher priority"

DISK_PRESSURE = (
    "The node was low on resource: ephemeral-storage. Threshold quantity: 10737418240, available: 9663676416. "
    "Container transfer was using 122Ki, request is 56Gi, has larger consumption of ephemeral-storage"
)


def read_attempts(job_object, pods):
    return read_run_status(RunObjects([job_object], pods)).attempts


@pytest.mark.parametrize(
    ("states", "more", "code", "error"),
    [
        (
            {"transfer": terminated(137, reason="OOMKilled")},
            {},
            137,
            "container transfer exceeded its memory limit of 32Gi and was OOM-killed. Raise spec.compute.memory to "
            "about 48Gi, or lower spec.transfer.batchSize, or set spec.transfer.featureCache: off",
        ),
        (
            {"transfer": done("transfer"), "fine-tune": terminated(137, reason="OOMKilled")},
            {},
            137,
            "container fine-tune exceeded its memory limit of 32Gi and was OOM-killed. Raise spec.compute.memory to "
            "about 48Gi, or lower spec.fineTune.batchSize, or set spec.fineTune.featureCache: off",
        ),
        (
            {"pull": terminated(137, reason="OOMKilled")},
            {},
            137,
            "container pull exceeded its memory limit of 32Gi and was OOM-killed. Raise spec.compute.memory to about "
            "48Gi",
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
            {"transfer": terminated(137)},
            {
                "reason": "Evicted",
                "message": "Pod ephemeral local storage usage exceeds the total limit of containers 56Gi. ",
            },
            137,
            "evicted: Pod ephemeral local storage usage exceeds the total limit of containers 56Gi. Raise "
            "spec.compute.scratch",
        ),
        (
            {"transfer": terminated(137)},
            {"reason": "Evicted", "message": 'Container transfer exceeded its local ephemeral storage limit "56Gi". '},
            137,
            'evicted: Container transfer exceeded its local ephemeral storage limit "56Gi". Raise spec.compute.scratch',
        ),
        (
            {"pull": waiting()},
            {"reason": "Evicted", "message": "Pod was rejected: The node had condition: [DiskPressure]. "},
            None,
            "evicted from node gpu-1, whose disk is full: Pod was rejected: The node had condition: [DiskPressure]. "
            "The pod requested 56Gi. Free disk space on the node, or keep the run off it with "
            "spec.compute.nodeSelector or affinity",
        ),
        (
            {"pull": failed("pull", 75, "Stopped while the disk of the node was nearly full.")},
            {"reason": "Evicted", "conditions": (disruption("TerminationByKubelet", DISK_PRESSURE),)},
            75,
            f"evicted from node gpu-1, whose disk is full: {DISK_PRESSURE}. The pod requested 56Gi. Free disk space on "
            "the node, or keep the run off it with spec.compute.nodeSelector or affinity",
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
        "out of memory in fine-tune",
        "out of memory in pull",
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
        "storage limit of the pod",
        "storage limit of a container",
        "rejected by a full node",
        "disk pressure during pull",
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
            "evicted from node gpu-1, which ran out of memory: The node was low on resource: memory. Threshold "
            "quantity: 100Mi, available: 80Mi. Container transfer was using 30Gi, request is 32Gi, has larger "
            "consumption of memory. Other processes on the node use more memory than they requested: free memory, or "
            "keep the run off the node with spec.compute.nodeSelector or affinity",
        ),
        (
            disruption("TerminationByKubelet", f"{DISK_PRESSURE}. "),
            {"reason": "Evicted"},
            f"evicted from node gpu-1, whose disk is full: {DISK_PRESSURE}. The pod requested 56Gi. Free disk space on "
            "the node, or keep the run off it with spec.compute.nodeSelector or affinity",
        ),
        (
            disruption("TerminationByKubelet", "The node was low on resource: inodes. Threshold quantity: 5%. "),
            {"reason": "Evicted"},
            "evicted from node gpu-1, whose disk is full: The node was low on resource: inodes. Threshold quantity: "
            "5%. The pod requested 56Gi. Free disk space on the node, or keep the run off it with "
            "spec.compute.nodeSelector or affinity",
        ),
        (
            disruption("TerminationByKubelet", "The node was low on resource: pids. "),
            {"reason": "Evicted"},
            "evicted from node gpu-1, which ran out of pids: The node was low on resource: pids",
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
    ids=[
        "preempted",
        "taint",
        "drained",
        "node gone",
        "memory pressure",
        "disk pressure",
        "inodes",
        "processes",
        "shutdown",
        "unknown reason",
    ],
)
def test_disrupted_pod_has_an_error_and_is_not_counted(condition, more, error):
    disrupted = pod(PULLED | {"transfer": terminated(137)}, phase="Failed", conditions=(condition,), **more)
    (attempt,) = read_attempts(job(), [disrupted])
    assert (attempt.error, attempt.counted) == (error, False)


@pytest.mark.parametrize(
    ("memory", "advice"),
    [
        ("8Gi", "Raise spec.compute.memory to about 12Gi"),
        ("1536Mi", "Raise spec.compute.memory to about 3Gi"),
        ("9G", "Raise spec.compute.memory to about 13Gi"),
        ("512Mi", "Raise spec.compute.memory to about 768Mi"),
        ("600M", "Raise spec.compute.memory to about 1024Mi"),
    ],
)
def test_advice_after_running_out_of_memory_names_an_amount(memory, advice):
    killed = pod(
        {"pull": terminated(137, reason="OOMKilled")}, phase="Failed", of=job(memory=memory, sharedMemory="1Mi")
    )
    (attempt,) = read_attempts(job(memory=memory, sharedMemory="1Mi"), [killed])
    assert attempt.error == f"container pull exceeded its memory limit of {memory} and was OOM-killed. {advice}"


def test_prefetch_pod_that_runs_out_of_memory_is_not_helped_by_more_memory():
    prefetch = job(role="prefetch")
    killed = pod({"pull": terminated(137, reason="OOMKilled")}, phase="Failed", of=prefetch)
    (attempt,) = read_attempts(prefetch, [killed])
    assert attempt.error == (
        "container pull exceeded its memory limit of 8Gi and was OOM-killed. A prefetch pod gets at most 8Gi. Set "
        "spec.compute.prefetch: false: the training pod then pulls the dataset with spec.compute.memory"
    )


def test_storage_failure_of_a_drained_pod_is_counted():
    unreachable = pod(
        PULLED | {"transfer": failed("transfer", 75, "no answer")},
        phase="Failed",
        conditions=(disruption("EvictionByEvictionAPI", "Eviction API: evicting"),),
    )
    (attempt,) = read_attempts(job(), [unreachable])
    assert (attempt.state, attempt.counted) == ("failed", True)


def test_pod_that_exceeded_its_scratch_volume_and_exited_with_2_fails_the_job():
    evicted = pod(
        {"pull": failed("pull", 2, "/scratch contains 51 GiB. Raise spec.compute.scratch.")},
        phase="Failed",
        reason="Evicted",
        message='Usage of EmptyDir volume "scratch" exceeds the limit "50Gi". ',
    )
    status = read_run_status(RunObjects([failed_job(failed_by_policy("pull", 2))], [evicted]))
    assert (status.phase, status.exit_code) == ("failed", 2)
    assert status.error == "evicted: the volume scratch exceeded its limit of 50Gi. Raise spec.compute.scratch"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("500m", 0.5),
        ("8", 8),
        ("9Gi", 9 * 2**30),
        ("10Gi", 10 * 2**30),
        ("1e3", 1000),
        ("12E2", 1200),
        ("1.5Ki", 1536),
        ("2E", 2e18),
        ("2Ei", 2**61),
        ("100n", 1e-7),
        (".5M", 500_000),
        ("-1", -1),
        ("nonsense", 0),
        ("", 0),
    ],
)
def test_quantities_are_parsed_as_kubernetes_does(text, value):
    assert float(parse_quantity(text)) == pytest.approx(value)


@pytest.mark.parametrize(
    ("amounts", "largest"),
    [
        (["9Gi", "10Gi", "512Mi"], "10Gi"),
        (["500m", "4"], "4"),
        (["7500m", "8"], "8"),
        (["34359738368", "64Gi"], "64Gi"),
        (["1024Mi", "2Gi"], "2Gi"),
        (["900M", "1Gi"], "1Gi"),
    ],
)
def test_requested_amount_is_the_largest_value_not_the_longest_text(amounts, largest):
    for order in (amounts, amounts[::-1]):
        example = pod()
        containers = [*example["spec"]["initContainers"], *example["spec"]["containers"]]
        for container in containers:
            container["resources"] = {}
        for container, amount in zip(containers, order, strict=False):
            container["resources"] = {"requests": {"memory": amount}}
        assert requested_amount(example, "memory") == largest
