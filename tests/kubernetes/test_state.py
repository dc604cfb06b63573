"""How a run stands, told from objects as a real cluster shows them."""

from dataclasses import replace
from datetime import UTC, datetime

import pytest
from states import (
    MODEL,
    NAMESPACE,
    NO_GPUS,
    NODE,
    NOW,
    PULLED,
    RUN,
    TRANSFERRED,
    backoff_limit_exceeded,
    by_policy,
    completed_job,
    deadline_exceeded,
    disruption,
    done,
    event,
    failed,
    failed_job,
    finished_pod,
    job,
    job_condition,
    pending_pod,
    pod,
    preemption,
    running,
    stopped,
    success_criteria_met,
    suspended_job,
    terminated,
    waiting,
)

from topwork.cluster.status.attempts import Attempt, Container
from topwork.cluster.status.epochs import Epoch
from topwork.cluster.status.objects import RunObjects
from topwork.cluster.status.run_state import RunState, run_state

PREEMPTED = "preempted: the scheduler made room for a pod of higher priority"


def state_of(jobs, pods=(), events=(), epoch=None, deleted=()):
    jobs = jobs if isinstance(jobs, list) else [jobs]
    return run_state(RunObjects(jobs, list(pods), list(events), frozenset(deleted)), epoch)


def told(state):
    """What changes most: phase, stage, reason, exit code and error."""
    return state.phase, state.stage, state.reason, state.exit_code, state.error


def test_a_run_that_is_done_tells_model_metric_and_every_stage():
    state = state_of(completed_job(), [finished_pod()])
    # What each container left as its message is compared in other tests.
    containers = tuple(replace(container, ending=None) for container in state.attempts[0].containers)

    assert replace(state, attempts=()) == RunState(
        job="flowers",
        run=RUN,
        namespace=NAMESPACE,
        phase="succeeded",
        stage="fine-tune",
        failures=0,
        retries=3,
        metric="accuracy",
        value=0.97,
        model=MODEL,
        exit_code=0,
        created=NOW,
        ended=datetime(2026, 3, 1, 12, 10, tzinfo=UTC),
        node=NODE,
    )
    assert state.is_over
    at = [
        datetime(2026, 3, 1, 12, minute, second, tzinfo=UTC)
        for minute, second in ((0, 10), (1, 40), (1, 40), (3, 10), (3, 20), (4, 50))
    ]
    assert containers == (
        Container("pull", "done", at[0], at[1], 0),
        Container("transfer", "done", at[2], at[3], 0),
        Container("fine-tune", "done", at[4], at[5], 0),
    )


def test_a_success_that_is_decided_is_a_success_before_the_job_says_complete():
    decided = job(success_criteria_met())
    assert told(state_of(decided, [finished_pod()])) == ("succeeded", "fine-tune", None, 0, None)


def test_a_job_without_a_pod_is_pending():
    assert told(state_of(job())) == ("pending", None, None, None, None)


@pytest.mark.parametrize(
    ("states", "stage"),
    [
        ({"pull": running()}, "pull"),
        (PULLED, "transfer"),
        (PULLED | {"transfer": running(100)}, "transfer"),
        (TRANSFERRED, "fine-tune"),
        (TRANSFERRED | {"fine-tune": running(200)}, "fine-tune"),
    ],
    ids=["pulling", "between pull and transfer", "transfer", "between transfer and fine-tune", "fine-tune"],
)
def test_a_pod_whose_containers_run_tells_the_stage(states, stage):
    state = state_of(job(), [pod(states)])
    assert told(state) == ("running", stage, None, None, None)
    assert state.node == NODE


def test_the_metric_of_a_running_stage_comes_from_its_log_and_before_that_from_the_last_stage():
    pods = [pod(TRANSFERRED | {"fine-tune": running(200)})]
    before = state_of(job(), pods)
    assert (before.metric, before.value, before.epoch) == ("validation_accuracy", 0.91, None)
    epoch = Epoch("fine-tune", 3, 10, "validation_accuracy", 0.92, 0.95)
    after = state_of(job(), pods, epoch=epoch)
    assert (after.metric, after.value, after.epoch) == ("validation_accuracy", 0.95, epoch)


def test_an_epoch_of_another_stage_than_the_one_that_runs_is_not_shown():
    epoch = Epoch("transfer", 5, 5, "validation_accuracy", 0.91, 0.91)
    state = state_of(job(), [pod(TRANSFERRED | {"fine-tune": running(200)})], epoch=epoch)
    assert (state.epoch, state.stage) == (None, "fine-tune")


def test_the_container_whose_log_grows_is_the_one_that_runs():
    assert state_of(job(), [pod(PULLED | {"transfer": running()})]).running == (f"{RUN}-abcde", "transfer")
    assert state_of(completed_job(), [finished_pod()]).running is None


def test_a_pod_that_waits_for_a_node_tells_why():
    state = state_of(job(), [pending_pod(NO_GPUS)])
    assert told(state) == (
        "pending",
        None,
        "no node has 2 free nvidia.com/gpu (3 of 5 lack it); 2 of 5 have the taint "
        "node-role.kubernetes.io/control-plane, which the job does not tolerate; wait until one is free, or "
        "lower spec.compute.gpus",
        None,
        None,
    )


def test_a_spec_error_ends_the_run_with_2_and_the_sentence_of_the_stage():
    pods = [pod({"pull": failed("pull", 2, "s3://photos/flowers/ holds no image.")}, phase="Failed")]
    state = state_of(failed_job(by_policy("pull", 2)), pods)
    assert told(state) == ("failed", "pull", None, 2, "s3://photos/flowers/ holds no image")
    assert state.attempts[0] == Attempt(
        pod=f"{RUN}-abcde",
        node=NODE,
        created=datetime(2026, 3, 1, 12, 0, 1, tzinfo=UTC),
        state="failed",
        containers=state.attempts[0].containers,
        exit_code=2,
        error="s3://photos/flowers/ holds no image",
        counted=True,
    )


def test_a_gate_that_is_not_met_ends_the_run_with_3():
    gate = failed("fine-tune", 3, "accuracy is 0.90, below 0.95", since=200, metric="accuracy", value=0.9)
    pods = [pod(TRANSFERRED | {"fine-tune": gate}, phase="Failed")]
    state = state_of(failed_job(by_policy("fine-tune", 3)), pods)
    assert told(state) == ("failed", "fine-tune", None, 3, "accuracy is 0.90, below 0.95")
    assert (state.metric, state.value) == ("accuracy", 0.9)


def test_a_job_that_will_fail_is_stopping_until_its_pods_have_ended():
    pods = [pod({"pull": failed("pull", 2, "no such bucket")}, phase="Failed")]
    assert told(state_of(job(by_policy("pull", 2, "FailureTarget")), pods)) == (
        "stopping",
        "pull",
        "no such bucket",
        None,
        None,
    )


def test_a_policy_failure_whose_pod_is_gone_still_has_its_exit_code():
    state = state_of(failed_job(by_policy("transfer", 2)))
    assert told(state) == (
        "failed",
        None,
        None,
        2,
        f"Container transfer for pod {NAMESPACE}/{RUN}-abcde failed with exit code 2 matching FailJob rule at index 0",
    )


def test_retries_that_are_used_up_end_the_run_with_the_code_and_error_of_the_last():
    unreachable = failed("pull", 75, "s3.example.com does not answer")
    pods = [pod({"pull": unreachable}, phase="Failed", suffix=str(index), created=index) for index in range(4)]
    state = state_of(failed_job(backoff_limit_exceeded(), failures=4), pods)
    assert told(state) == ("failed", "pull", None, 75, "s3.example.com does not answer (attempt 4 of 4)")
    assert (state.failures, len(state.attempts)) == (4, 4)


def test_retries_that_are_used_up_without_a_pod_left_end_with_1():
    state = state_of(failed_job(backoff_limit_exceeded(), failures=1, retries=0))
    assert told(state) == ("failed", None, None, 1, "Job has reached the specified backoff limit")


def test_a_deadline_that_is_over_ends_the_run_with_75():
    assert told(state_of(failed_job(deadline_exceeded()))) == (
        "failed",
        None,
        None,
        75,
        "it ran longer than spec.compute.deadlineSeconds (3600 s). Raise it and submit again: the run goes on from its "
        "checkpoint",
    )


def test_a_failure_of_a_kind_that_is_not_known_is_told_in_the_words_of_kubernetes():
    odd = job_condition("Failed", "SomethingNew", "A sentence\nof a later Kubernetes.")
    assert told(state_of(failed_job(odd)))[3:] == (1, "A sentence of a later Kubernetes")


def test_a_preempted_pod_is_stopping_and_then_replaced_and_counts_for_nothing():
    leaving = pod(PULLED | {"transfer": running()}, conditions=(preemption(),), deleted=120)
    state = state_of(job(), [leaving])
    assert told(state) == (
        "stopping",
        "transfer",
        f"{PREEMPTED}. Its checkpoint is kept, and a new pod goes on",
        None,
        None,
    )

    gone = pod(PULLED | {"transfer": stopped("transfer", 100)}, conditions=(preemption(),), deleted=120, phase="Failed")
    state = state_of(job(), [gone])
    assert told(state) == (
        "pending",
        "transfer",
        f"{RUN}-abcde ended with exit code 143: {PREEMPTED}; a new pod follows",
        None,
        None,
    )
    assert [(attempt.state, attempt.exit_code, attempt.counted) for attempt in state.attempts] == [
        ("stopped", 143, False)
    ]

    state = state_of(job(), [gone, pod({"pull": running(300)}, suffix="later", created=200)])
    assert told(state) == ("running", "pull", None, None, None)
    assert [attempt.state for attempt in state.attempts] == ["stopped", "running"]


def test_a_pod_that_was_stopped_by_its_deletion_counts_for_nothing():
    gone = pod(PULLED | {"transfer": stopped("transfer", 100)}, deleted=120, phase="Failed")
    (attempt,) = state_of(job(), [gone]).attempts
    assert (attempt.state, attempt.exit_code, attempt.counted, attempt.error) == (
        "stopped",
        143,
        False,
        "stopped at epoch 3",
    )


def test_a_failure_that_is_retried_counts():
    status = {"failed": 1}
    state = state_of(job(status=status), [pod({"pull": failed("pull", 75, "no answer")}, phase="Failed")])
    assert state.attempts[0].counted
    assert told(state) == (
        "pending",
        "pull",
        f"{RUN}-abcde ended with exit code 75: no answer; the next attempt follows after a pause, which Kubernetes "
        "doubles each time",
        None,
        None,
    )


def test_a_pod_that_disappeared_was_stopped():
    vanished = pod(PULLED | {"transfer": running(100)})
    state = state_of(job(), [vanished], deleted=[vanished["metadata"]["uid"]])
    assert [(attempt.state, attempt.error) for attempt in state.attempts] == [("stopped", "its pod was deleted")]


def test_a_job_that_is_being_deleted_is_stopping():
    leaving = job()
    leaving["metadata"]["deletionTimestamp"] = leaving["metadata"]["creationTimestamp"]
    assert told(state_of(leaving, [pod({"pull": running()}, deleted=10)])) == (
        "stopping",
        "pull",
        "its Job is being deleted",
        None,
        None,
    )


def test_a_job_that_was_deleted_ends_the_run_with_143():
    gone = job()
    state = state_of(gone, [pod({"pull": running()})], deleted=[gone["metadata"]["uid"]])
    assert told(state) == ("failed", "pull", None, 143, "its Job was deleted")


def test_a_job_that_was_done_or_hopeless_before_it_was_removed_ends_as_its_pod_did():
    gone = job()
    deleted = [gone["metadata"]["uid"]]
    assert told(state_of(gone, [finished_pod()], deleted=deleted)) == ("succeeded", "fine-tune", None, 0, None)
    pods = [pod({"pull": failed("pull", 2, "no such bucket")}, phase="Failed")]
    assert told(state_of(gone, pods, deleted=deleted)) == ("failed", "pull", None, 2, "no such bucket")


def test_a_suspended_job_waits_for_its_queue():
    state = state_of(suspended_job("team-a"))
    assert told(state)[:3] == (
        "suspended",
        None,
        "waiting for room in the queue team-a; see kubectl get workloads, and kubectl get localqueue team-a",
    )
    assert state.queue == "team-a"


def test_while_the_dataset_is_pulled_ahead_the_run_is_pulling_ahead():
    ahead = job(role="prefetch")
    pulling = pod({"pull": running()}, of=ahead, node="cpu-1")
    state = state_of([job(prefetch=True), ahead], [pulling, pending_pod(NO_GPUS, of=job(prefetch=True))])
    assert (state.phase, state.stage, state.node, state.reason.split(" (")[0]) == (
        "pulling ahead",
        "pull",
        "cpu-1",
        "no node has 2 free nvidia.com/gpu",
    )


def test_a_training_pod_that_runs_says_more_than_the_job_that_pulled_ahead():
    ahead = failed_job(by_policy("pull", 2, role="prefetch"), role="prefetch")
    assert told(state_of([job(prefetch=True), ahead], [pod({"pull": running()})])) == (
        "running",
        "pull",
        None,
        None,
        None,
    )


def test_a_dataset_that_was_pulled_ahead_alone_waits_for_the_job():
    ahead = job(success_criteria_met(), role="prefetch")
    pulled = pod({"pull": done("pull")}, of=ahead, phase="Succeeded")
    assert told(state_of(ahead, [pulled])) == (
        "pending",
        "pull",
        "the dataset is pulled; submit the job again to train",
        None,
        None,
    )


def test_events_about_another_job_of_the_name_say_nothing():
    other = job()
    other["metadata"] = other["metadata"] | {"uid": "of an earlier one"}
    refused = event(other, "FailedCreate", "Error creating: something old")
    assert state_of(job(), events=[refused]).reason is None


@pytest.mark.parametrize(
    ("states", "more", "code", "error"),
    [
        (
            {"transfer": terminated(137, reason="OOMKilled")},
            {},
            137,
            "transfer needed more memory than 32Gi and was killed. Raise spec.compute.memory",
        ),
        (
            {"transfer": terminated(137)},
            {},
            137,
            "killed (SIGKILL): the node ran out of memory, or the grace period was over before the checkpoint was kept",
        ),
        (
            {"transfer": terminated(135)},
            {},
            135,
            "bus error (SIGBUS), mostly for want of room in /dev/shm. Raise spec.compute.sharedMemory",
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
        ({"transfer": terminated(1)}, {}, 1, "exit code 1 without a word"),
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
            'transfer could not be started: failed to create containerd task: exec: "tini": executable file not found '
            "in $PATH: unknown. Is registry.example.com/topwork:1-gpu an image of topwork?",
        ),
        (
            {"transfer": terminated(137, "The container could not be located", "ContainerStatusUnknown")},
            {},
            137,
            "the node lost track of transfer",
        ),
        (
            {"transfer": terminated(137)},
            {"reason": "Evicted", "message": 'Usage of EmptyDir volume "scratch" exceeds the limit "50Gi". '},
            137,
            "evicted: the volume scratch holds more than 50Gi. Raise spec.compute.scratch",
        ),
        (
            {"transfer": terminated(137)},
            {"reason": "Evicted", "message": 'Usage of EmptyDir volume "shm" exceeds the limit "2Gi". '},
            137,
            "evicted: the volume shm holds more than 2Gi. Raise spec.compute.sharedMemory",
        ),
        (
            {},
            {
                "reason": "UnexpectedAdmissionError",
                "message": "Pod was rejected: Allocate failed due to requested number "
                "of devices unavailable for nvidia.com/gpu. Requested: 2, Available: 0, which is unexpected",
            },
            None,
            "node gpu-1 refused or ended the pod (UnexpectedAdmissionError): Pod was rejected: Allocate failed due to "
            "requested number of devices unavailable for nvidia.com/gpu. Requested: 2, Available: 0, which is "
            "unexpected",
        ),
    ],
    ids=[
        "out of memory",
        "killed",
        "bus error",
        "crashed",
        "traceback",
        "a line of the log",
        "nothing said",
        "wrong image",
        "lost",
        "scratch full",
        "shared memory full",
        "no GPU left",
    ],
)
def test_a_pod_that_failed_says_why_and_counts(states, more, code, error):
    state = state_of(job(status={"failed": 1}), [pod(PULLED | states, phase="Failed", **more)])
    (attempt,) = state.attempts
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
        (disruption("DeletionByPodGC", "PodGC: node no longer exists"), {}, "lost with node gpu-1, which is gone"),
        (
            disruption(
                "TerminationByKubelet",
                "The node was low on resource: memory. Threshold quantity: 100Mi, available: 80Mi. Container transfer "
                "was using 30Gi, request is 32Gi, has larger consumption of memory. ",
            ),
            {"reason": "Evicted"},
            "ended by node gpu-1: The node was low on resource: memory. Threshold quantity: 100Mi, available: 80Mi. "
            "Container transfer was using 30Gi, request is 32Gi, has larger consumption of memory",
        ),
        (
            disruption("TerminationByKubelet", "Pod was terminated in response to imminent node shutdown."),
            {"reason": "Terminated"},
            "ended by node gpu-1: Pod was terminated in response to imminent node shutdown",
        ),
        (
            disruption("DeletionByDeviceTaintManager", "Device Taint manager: deleting due to NoExecute taint"),
            {},
            "ended by node gpu-1: Device Taint manager: deleting due to NoExecute taint",
        ),
    ],
    ids=["preempted", "taint", "drained", "node gone", "memory pressure", "shutdown", "of a later Kubernetes"],
)
def test_a_pod_that_was_disrupted_says_why_and_does_not_count(condition, more, error):
    disrupted = pod(PULLED | {"transfer": terminated(137)}, phase="Failed", conditions=(condition,), **more)
    (attempt,) = state_of(job(), [disrupted]).attempts
    assert (attempt.error, attempt.counted) == (error, False)


def test_a_pod_whose_containers_are_being_created_is_pending():
    new = pod({"pull": waiting("ContainerCreating")}, phase="Pending")
    assert told(state_of(job(), [new])) == ("pending", None, None, None, None)


def test_containers_that_others_put_into_the_pod_are_not_stages():
    meshed = pod({"pull": running()})
    meshed["spec"]["containers"].append({"name": "istio-proxy", "image": "istio"})
    meshed["status"]["containerStatuses"].append({"name": "istio-proxy", "state": waiting()})
    (attempt,) = state_of(job(), [meshed]).attempts
    assert [container.stage for container in attempt.containers] == ["pull", "transfer", "fine-tune"]
