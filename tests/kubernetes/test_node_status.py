"""The status of a run on several nodes, from objects as a real cluster returns them."""

from collections.abc import Sequence
from typing import Any

import pytest
import sample_objects
from sample_objects import (
    MODEL,
    NO_GPUS,
    PULLED,
    RUN,
    TRANSFERRED,
    backoff_limit_exceeded,
    done,
    event,
    failed,
    failed_by_policy,
    job_condition,
    published,
    running,
    stopped,
    suspended_job,
    terminated,
)

from topwork.cli.output.follow import ProgressReporter
from topwork.cli.output.status_printer import format_details, status_to_json
from topwork.cluster.status.objects import RunObjects
from topwork.cluster.status.run_status import EpochProgress, RunStatus, read_run_status

Object = dict[str, Any]
NO_FREE_GPUS = (
    "no node has 2 free nvidia.com/gpu (insufficient on 3 of 5); 2 of 5 nodes have the taint "
    "node-role.kubernetes.io/control-plane, which the job does not tolerate; wait until a node is free, or lower "
    "spec.compute.gpus"
)
OUT_OF_MEMORY = (
    "container transfer exceeded its memory limit of 32Gi and was OOM-killed. Raise spec.compute.memory to about 48Gi, "
    "or lower spec.transfer.batchSize, or set spec.transfer.featureCache: off"
)


def job(*conditions: Object, nodes: int = 2, **options: Any) -> Object:
    return sample_objects.job(*conditions, nodes=nodes, **options)


def node(index: int, states: dict[str, Object] | None = None, *, of: Object | None = None, **options: Any) -> Object:
    return sample_objects.pod(states, of=of or job(), index=index, node=f"gpu-{index + 1}", **options)


def ended(index: int, state: Object, **options: Any) -> Object:
    """Return a pod whose container of the stage transfer failed or was stopped."""
    return node(index, PULLED | {"transfer": state}, phase="Failed", **options)


def pending(index: int, message: str = NO_GPUS, *, of: Object | None = None, **options: Any) -> Object:
    return sample_objects.pending_pod(message, of=of or job(), index=index, **options)


def oom_killed(since: float = 100) -> Object:
    return terminated(137, reason="OOMKilled", since=since)


def lost_peer(index: int, since: float = 100, stage: str = "transfer") -> Object:
    return failed(stage, 75, f"Lost the connection to node {index}", since=since)


def read(owner: Object, pods: Sequence[Object], events: Sequence[Object] = (), **options: Any) -> RunStatus:
    return read_run_status(RunObjects([owner], list(pods), list(events)), **options)


def summary(status: RunStatus) -> tuple[str, str | None, str | None]:
    return status.phase, status.stage, status.reason


TRAINING = PULLED | {"transfer": running(100)}


def test_a_run_is_running_if_all_nodes_are():
    epoch = EpochProgress("transfer", 3, 20, "validation_accuracy", 0.8, 0.9)
    status = read(job(), [node(1, TRAINING), node(0, TRAINING)], epoch=epoch)
    assert summary(status) == ("running", "transfer", None)
    assert (status.nodes, status.attempt_count, status.node, status.epoch) == (2, 1, "gpu-1", epoch)
    assert status.running_container == (f"{RUN}-0-abcde", "transfer")


def test_metric_and_model_are_those_of_node_0():
    conditions = (
        job_condition("SuccessCriteriaMet", "SuccessPolicy", "Matched rules at index 0"),
        job_condition("Complete", "SuccessPolicy", "Matched rules at index 0"),
    )
    chief = node(0, TRANSFERRED | {"fine-tune": published()}, phase="Succeeded")
    other = node(
        1,
        PULLED
        | {"transfer": done("transfer"), "fine-tune": done("fine-tune", metric="loss", value=9.0, model="s3://x")},
    )
    status = read(job(*conditions), [chief, other])
    assert (status.phase, status.exit_code, status.model) == ("succeeded", 0, MODEL)
    assert (status.metric, status.value) == ("accuracy", 0.97)


def test_a_node_that_has_finished_does_not_end_the_run_before_node_0():
    finished = node(1, TRANSFERRED | {"fine-tune": done("fine-tune")}, phase="Succeeded")
    status = read(job(), [node(0, TRANSFERRED | {"fine-tune": running(200)}), finished])
    assert summary(status) == ("running", "fine-tune", None)


@pytest.mark.parametrize(
    ("pods", "reason"),
    [
        ([node(0, {"pull": running()}), pending(1)], f"1 of 2 pods is pending: {NO_FREE_GPUS}"),
        ([pending(0), pending(1)], f"2 of 2 pods are pending: {NO_FREE_GPUS}"),
        ([node(0, {"pull": running()})], "1 of 2 pods is pending"),
    ],
)
def test_a_run_is_pending_as_long_as_a_node_is(pods: list[Object], reason: str):
    status = read(job(), pods)
    assert (status.phase, status.reason) == ("pending", reason)


def test_pods_that_cannot_be_created_are_missing():
    quota = event(job(), "FailedCreate", sample_objects.QUOTA)
    status = read(job(), [node(0, {"pull": running()})], [quota])
    assert summary(status) == (
        "pending",
        "pull",
        "1 of 2 pods is pending: exceeded quota gpus: requested requests.nvidia.com/gpu=2, used "
        "requests.nvidia.com/gpu=7, limited to requests.nvidia.com/gpu=8. Wait, request less, or see kubectl describe "
        "quota gpus",
    )


def test_different_reasons_name_their_nodes():
    owner = job(nodes=4)
    pods = [
        node(0, {"pull": running()}, of=owner),
        *(pending(index, "no GPUs", of=owner) for index in (1, 3)),
        pending(2, "no memory", of=owner),
    ]
    assert read(owner, pods).reason == "3 of 4 pods are pending: no GPUs (nodes 1, 3); no memory (node 2)"


def test_a_killed_node_is_named_while_the_others_still_run():
    status = read(job(), [node(0, TRAINING), ended(1, oom_killed())])
    assert summary(status) == (
        "pending",
        "transfer",
        f"1 of 2 pods is pending: {RUN}-1-abcde ended with exit code 137: {OUT_OF_MEMORY}; new pods will be created",
    )


def test_a_failed_attempt_is_explained_by_the_pod_that_failed_first():
    pods = [
        ended(0, lost_peer(1, since=99)),
        ended(1, oom_killed(since=100)),
    ]
    status = read(job(status={"failed": 2}), pods)
    assert status.reason == (
        f"2 of 2 pods are pending: {RUN}-1-abcde ended with exit code 137: {OUT_OF_MEMORY}; the next attempt starts "
        "after a back-off delay, which Kubernetes doubles each time"
    )
    assert (status.failures, status.retries) == (1, 3)


def test_among_equal_failures_the_first_one_is_the_cause():
    unavailable = failed("transfer", 75, "storage did not respond", since=100)
    pods = [ended(0, lost_peer(1, since=102)), ended(1, unavailable)]
    status = read(job(backoff_limit_exceeded(), status={"failed": 8}, retries=0), pods)
    assert (status.exit_code, status.error) == (75, "node 1: storage did not respond")


def test_an_evicted_node_stops_the_run():
    drained = sample_objects.disruption("EvictionByEvictionAPI", "Eviction API: evicting")
    pods = [node(0, TRAINING), node(1, TRAINING, deleted=120, conditions=(drained,))]
    assert summary(read(job(), pods)) == (
        "stopping",
        "transfer",
        "node 1: evicted from node gpu-2, which is being drained. The checkpoint is kept, and new pods will resume "
        "from it",
    )
    pods = [
        ended(0, stopped("transfer", since=100)),
        ended(1, stopped("transfer", since=101), conditions=(drained,)),
    ]
    assert read(job(), pods).reason == (
        f"2 of 2 pods are pending: {RUN}-1-abcde ended with exit code 143: evicted from node gpu-2, which is being "
        "drained; new pods will be created"
    )


def test_replaced_pods_are_the_next_attempt():
    first = [
        ended(0, lost_peer(1), suffix="aaaaa"),
        ended(1, oom_killed(), suffix="bbbbb"),
    ]
    second = [node(1, TRAINING, suffix="ccccc", created=210), node(0, TRAINING, suffix="ddddd", created=211)]
    status = read(job(status={"failed": 2}), [*first, *second])
    assert summary(status) == ("running", "transfer", None)
    assert (status.attempt_count, status.failures, status.retries) == (2, 1, 3)
    assert [(attempt.index, attempt.number) for attempt in status.attempts] == [(0, 1), (1, 1), (1, 2), (0, 2)]
    assert status.running_container == (f"{RUN}-0-ddddd", "transfer")
    lines = list(format_details(status))
    assert "  attempts  2, 1 of them counted (retries: 3)" in lines
    assert "  nodes     2" in lines
    assert lines[-1] == f"earlier: {RUN}-1-bbbbb failed with exit code 137: {OUT_OF_MEMORY}"
    table = [line.split()[:5] for line in lines if line.startswith(("0 ", "1 "))]
    assert table == [
        ["0", f"{RUN}-0-ddddd", "gpu-1", "running", "transfer"],
        ["1", f"{RUN}-1-ccccc", "gpu-2", "running", "transfer"],
    ]


def test_exceeded_retries_count_attempts_and_name_the_first_failure():
    pods = []
    for attempt in range(4):
        start = 100 + 300 * attempt
        pods += [
            ended(0, lost_peer(1, start), suffix=f"aaaa{attempt}", created=start),
            ended(1, oom_killed(start), suffix=f"bbbb{attempt}", created=start),
        ]
    status = read(job(backoff_limit_exceeded(), status={"failed": 7}), pods)
    assert (status.phase, status.exit_code) == ("failed", 137)
    assert status.error == f"node 1: {OUT_OF_MEMORY} (attempt 4 of 4)"
    assert status.failures == 4


def test_a_replacement_that_never_started_does_not_hide_the_cause():
    pods = [
        ended(0, lost_peer(1, 101), suffix="aaaaa"),
        ended(1, oom_killed(100), suffix="bbbbb"),
        pending(1, suffix="ccccc", created=200),
    ]
    status = read(job(backoff_limit_exceeded(), status={"failed": 2}, retries=0), pods)
    assert (status.exit_code, status.error) == (137, f"node 1: {OUT_OF_MEMORY}")


def test_a_failure_of_an_earlier_attempt_is_not_the_cause():
    pods = [
        ended(1, oom_killed(100), suffix="bbbbb"),
        node(1, TRAINING, suffix="ccccc", created=200),
        ended(0, failed("transfer", 75, "storage did not respond", since=5000)),
    ]
    status = read(job(backoff_limit_exceeded(), status={"failed": 2}, retries=0), pods)
    assert (status.exit_code, status.error) == (75, "node 0: storage did not respond")


def test_a_failure_that_is_never_retried_names_its_node():
    pods = [
        ended(0, lost_peer(1)),
        ended(1, failed("transfer", 2, "2 GPUs are required", since=110)),
    ]
    failure = failed_by_policy("transfer", 2, pod="1-abcde")
    assert read(job(status={"failed": 1}), pods).phase == "stopping"
    status = read(job(failure, status={"failed": 2}), pods)
    assert (status.phase, status.exit_code, status.error) == ("failed", 2, "node 1: 2 GPUs are required")


def test_a_suspended_job_on_several_nodes_waits_for_its_queue():
    owner = suspended_job()
    owner["spec"] |= {"completionMode": "Indexed", "completions": 2, "parallelism": 2}
    status = read(owner, [])
    assert (status.phase, status.reason) == (
        "suspended",
        "waiting for quota in the queue team-a; see kubectl get workloads, and kubectl get localqueue team-a",
    )


def test_json_has_the_index_of_each_pod():
    content = status_to_json(read(job(), [node(0, TRAINING), node(1, TRAINING)]))
    assert content["nodes"] == 2
    assert [(attempt["pod"], attempt["index"]) for attempt in content["attempts"]] == [
        (f"{RUN}-0-abcde", 0),
        (f"{RUN}-1-abcde", 1),
    ]


def test_following_reports_stages_once_and_pods_with_their_node():
    reporter = ProgressReporter()
    lines = list(reporter.lines(read(job(), [node(0, TRAINING), node(1, TRAINING)])))
    assert lines == [
        f"node 0 started on machine gpu-1 (pod {RUN}-0-abcde)",
        "pull started",
        "pull done in 90s",
        "transfer started",
        f"node 1 started on machine gpu-2 (pod {RUN}-1-abcde)",
    ]
    first = [ended(0, lost_peer(1)), ended(1, oom_killed())]
    replaced = [*first, node(0, TRAINING, suffix="ccccc", created=300), node(1, TRAINING, suffix="ddddd", created=300)]
    assert list(reporter.lines(read(job(), replaced))) == [
        "attempt 1 of node 0 ended with exit code 75: Lost the connection to node 1",
        f"attempt 1 of node 1 ended with exit code 137: {OUT_OF_MEMORY}",
        f"attempt 2 of node 0 after exit code 75: started on machine gpu-1 (pod {RUN}-0-ccccc)",
        "pull started",
        "pull done in 90s",
        "transfer started",
        f"attempt 2 of node 1 after exit code 137: started on machine gpu-2 (pod {RUN}-1-ddddd)",
    ]
