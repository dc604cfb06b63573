"""The status of a run, from objects as a real cluster returns them."""

from dataclasses import replace
from datetime import UTC, datetime

import pytest
from sample_objects import (
    MODEL,
    NAMESPACE,
    NO_GPUS,
    NODE,
    NOW,
    PULLED,
    RUN,
    TRANSFERRED,
    backoff_limit_exceeded,
    completed_job,
    deadline_exceeded,
    done,
    event,
    failed,
    failed_by_policy,
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
    waiting,
)

from topwork.cluster.status.attempts import Attempt, ContainerStatus
from topwork.cluster.status.objects import RunObjects
from topwork.cluster.status.run_status import EpochProgress, RunStatus, read_run_status

PREEMPTED = "preempted by the scheduler in favor of a pod with higher priority"


def read_status(jobs, pods=(), events=(), epoch=None, deleted=()):
    jobs = jobs if isinstance(jobs, list) else [jobs]
    return read_run_status(RunObjects(jobs, list(pods), list(events), frozenset(deleted)), epoch)


def summary(state):
    """Return the fields that most tests compare: phase, stage, reason, exit code and error."""
    return state.phase, state.stage, state.reason, state.exit_code, state.error


def test_status_of_a_finished_run_has_model_metric_and_stages():
    state = read_status(completed_job(), [finished_pod()])
    # Other tests compare the termination messages.
    containers = tuple(replace(container, termination_message=None) for container in state.attempts[0].containers)

    assert replace(state, attempts=()) == RunStatus(
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
    assert state.is_finished
    times = [
        datetime(2026, 3, 1, 12, minute, second, tzinfo=UTC)
        for minute, second in ((0, 10), (1, 40), (1, 40), (3, 10), (3, 20), (4, 50))
    ]
    assert containers == (
        ContainerStatus("pull", "done", times[0], times[1], 0),
        ContainerStatus("transfer", "done", times[2], times[3], 0),
        ContainerStatus("fine-tune", "done", times[4], times[5], 0),
    )


def test_success_criteria_met_means_succeeded_before_the_job_is_complete():
    succeeding = job(success_criteria_met())
    assert summary(read_status(succeeding, [finished_pod()])) == ("succeeded", "fine-tune", None, 0, None)


def test_job_without_a_pod_is_pending():
    assert summary(read_status(job())) == ("pending", None, None, None, None)


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
def test_stage_is_that_of_the_running_container(states, stage):
    state = read_status(job(), [pod(states)])
    assert summary(state) == ("running", stage, None, None, None)
    assert state.node == NODE


def test_metric_comes_from_the_log_or_else_from_the_previous_stage():
    pods = [pod(TRANSFERRED | {"fine-tune": running(200)})]
    before = read_status(job(), pods)
    assert (before.metric, before.value, before.epoch) == ("validation_accuracy", 0.91, None)
    epoch = EpochProgress("fine-tune", 3, 10, "validation_accuracy", 0.92, 0.95)
    after = read_status(job(), pods, epoch=epoch)
    assert (after.metric, after.value, after.epoch) == ("validation_accuracy", 0.95, epoch)


def test_epoch_of_another_stage_is_ignored():
    epoch = EpochProgress("transfer", 5, 5, "validation_accuracy", 0.91, 0.91)
    state = read_status(job(), [pod(TRANSFERRED | {"fine-tune": running(200)})], epoch=epoch)
    assert (state.epoch, state.stage) == (None, "fine-tune")


def test_running_container_is_set_only_while_a_stage_runs():
    assert read_status(job(), [pod(PULLED | {"transfer": running()})]).running_container == (f"{RUN}-abcde", "transfer")
    assert read_status(completed_job(), [finished_pod()]).running_container is None


def test_unschedulable_pod_has_a_reason():
    state = read_status(job(), [pending_pod(NO_GPUS)])
    assert summary(state) == (
        "pending",
        None,
        "no node has 2 free nvidia.com/gpu (insufficient on 3 of 5); 2 of 5 nodes have the taint "
        "node-role.kubernetes.io/control-plane, which the job does not tolerate; wait until a node is free, or "
        "lower spec.compute.gpus",
        None,
        None,
    )


def test_spec_error_fails_the_run_with_2_and_the_error_of_the_stage():
    pods = [
        pod({"pull": failed("pull", 2, "s3://photos/flowers/ contains no image in a class directory.")}, phase="Failed")
    ]
    state = read_status(failed_job(failed_by_policy("pull", 2)), pods)
    assert summary(state) == ("failed", "pull", None, 2, "s3://photos/flowers/ contains no image in a class directory")
    assert state.attempts[0] == Attempt(
        pod=f"{RUN}-abcde",
        node=NODE,
        created=datetime(2026, 3, 1, 12, 0, 1, tzinfo=UTC),
        state="failed",
        containers=state.attempts[0].containers,
        exit_code=2,
        error="s3://photos/flowers/ contains no image in a class directory",
        counted=True,
    )


def test_unmet_gate_fails_the_run_with_3():
    gate = failed("fine-tune", 3, "accuracy is 0.90, below 0.95", since=200, metric="accuracy", value=0.9)
    pods = [pod(TRANSFERRED | {"fine-tune": gate}, phase="Failed")]
    state = read_status(failed_job(failed_by_policy("fine-tune", 3)), pods)
    assert summary(state) == ("failed", "fine-tune", None, 3, "accuracy is 0.90, below 0.95")
    assert (state.metric, state.value) == ("accuracy", 0.9)


def test_job_with_failure_target_is_stopping():
    pods = [pod({"pull": failed("pull", 2, "no such bucket")}, phase="Failed")]
    assert summary(read_status(job(failed_by_policy("pull", 2, "FailureTarget")), pods)) == (
        "stopping",
        "pull",
        "no such bucket",
        None,
        None,
    )


@pytest.mark.parametrize(("code", "retries"), [(2, 3), (3, 3), (75, 0)])
def test_failure_that_ends_the_job_announces_no_new_pod(code: int, retries: int):
    # The Job controller has not counted the pod yet.
    active = job()
    active["spec"]["backoffLimit"] = retries
    pods = [pod({"pull": failed("pull", code, "no such bucket")}, phase="Failed")]
    assert summary(read_status(active, pods)) == ("stopping", "pull", "no such bucket", None, None)


def test_policy_failure_has_its_exit_code_without_its_pod():
    state = read_status(failed_job(failed_by_policy("transfer", 2)))
    assert summary(state) == (
        "failed",
        None,
        None,
        2,
        f"Container transfer for pod {NAMESPACE}/{RUN}-abcde failed with exit code 2 matching FailJob rule at index 0",
    )


def test_exceeded_backoff_limit_has_code_and_error_of_the_last_attempt():
    unreachable = failed("pull", 75, "s3.example.com does not answer")
    pods = [pod({"pull": unreachable}, phase="Failed", suffix=str(index), created=index) for index in range(4)]
    state = read_status(failed_job(backoff_limit_exceeded(), failures=4), pods)
    assert summary(state) == ("failed", "pull", None, 75, "s3.example.com does not answer (attempt 4 of 4)")
    assert (state.failures, len(state.attempts)) == (4, 4)


def test_exceeded_backoff_limit_without_a_pod_fails_with_1():
    state = read_status(failed_job(backoff_limit_exceeded(), failures=1, retries=0))
    assert summary(state) == ("failed", None, None, 1, "Job has reached the specified backoff limit")


def test_exceeded_deadline_fails_the_run_with_75():
    assert summary(read_status(failed_job(deadline_exceeded()))) == (
        "failed",
        None,
        None,
        75,
        "the Job ran longer than spec.compute.deadlineSeconds (3600 s). Raise it and submit again: the run resumes "
        "from its checkpoint",
    )


def test_unknown_failure_reason_keeps_the_message_of_kubernetes():
    condition = job_condition("Failed", "SomethingNew", "A sentence\nof a later Kubernetes.")
    assert summary(read_status(failed_job(condition)))[3:] == (1, "A sentence of a later Kubernetes")


def test_preempted_pod_is_stopping_then_replaced_and_not_counted():
    terminating = pod(PULLED | {"transfer": running()}, conditions=(preemption(),), deleted=120)
    state = read_status(job(), [terminating])
    assert summary(state) == (
        "stopping",
        "transfer",
        f"{PREEMPTED}. Its checkpoint is kept, and a new pod will resume from it",
        None,
        None,
    )

    terminated = pod(
        PULLED | {"transfer": stopped("transfer", 100)}, conditions=(preemption(),), deleted=120, phase="Failed"
    )
    state = read_status(job(), [terminated])
    assert summary(state) == (
        "pending",
        "transfer",
        f"{RUN}-abcde ended with exit code 143: {PREEMPTED}; a new pod will be created",
        None,
        None,
    )
    assert [(attempt.state, attempt.exit_code, attempt.counted) for attempt in state.attempts] == [
        ("stopped", 143, False)
    ]

    state = read_status(job(), [terminated, pod({"pull": running(300)}, suffix="later", created=200)])
    assert summary(state) == ("running", "pull", None, None, None)
    assert [attempt.state for attempt in state.attempts] == ["stopped", "running"]


def test_pod_stopped_by_its_deletion_is_not_counted():
    terminated = pod(PULLED | {"transfer": stopped("transfer", 100)}, deleted=120, phase="Failed")
    (attempt,) = read_status(job(), [terminated]).attempts
    assert (attempt.state, attempt.exit_code, attempt.counted, attempt.error) == (
        "stopped",
        143,
        False,
        "stopped at epoch 3",
    )


def test_retried_failure_is_counted():
    status = {"failed": 1}
    state = read_status(job(status=status), [pod({"pull": failed("pull", 75, "no answer")}, phase="Failed")])
    assert state.attempts[0].counted
    assert summary(state) == (
        "pending",
        "pull",
        f"{RUN}-abcde ended with exit code 75: no answer; the next attempt starts after a back-off delay, which "
        "Kubernetes doubles each time",
        None,
        None,
    )


def test_deleted_pod_is_stopped():
    deleted_pod = pod(PULLED | {"transfer": running(100)})
    state = read_status(job(), [deleted_pod], deleted=[deleted_pod["metadata"]["uid"]])
    assert [(attempt.state, attempt.error) for attempt in state.attempts] == [("stopped", "the pod was deleted")]


def test_job_being_deleted_is_stopping():
    deleting = job()
    deleting["metadata"]["deletionTimestamp"] = deleting["metadata"]["creationTimestamp"]
    assert summary(read_status(deleting, [pod({"pull": running()}, deleted=10)])) == (
        "stopping",
        "pull",
        "the Job is being deleted",
        None,
        None,
    )


def test_deleted_job_fails_the_run_with_143():
    deleted_job = job()
    state = read_status(deleted_job, [pod({"pull": running()})], deleted=[deleted_job["metadata"]["uid"]])
    assert summary(state) == ("failed", "pull", None, 143, "the Job was deleted")


def test_job_deleted_after_its_end_has_the_outcome_of_its_pod():
    deleted_job = job()
    deleted = [deleted_job["metadata"]["uid"]]
    state = read_status(deleted_job, [finished_pod()], deleted=deleted)
    assert summary(state) == ("succeeded", "fine-tune", None, 0, None)
    pods = [pod({"pull": failed("pull", 2, "no such bucket")}, phase="Failed")]
    assert summary(read_status(deleted_job, pods, deleted=deleted)) == ("failed", "pull", None, 2, "no such bucket")


def test_suspended_job_waits_for_its_queue():
    state = read_status(suspended_job("team-a"))
    assert summary(state)[:3] == (
        "suspended",
        None,
        "waiting for quota in the queue team-a; see kubectl get workloads, and kubectl get localqueue team-a",
    )
    assert state.queue == "team-a"


def test_run_is_pulling_ahead_while_the_prefetch_job_runs():
    prefetch_job = job(role="prefetch")
    pulling = pod({"pull": running()}, of=prefetch_job, node="cpu-1")
    state = read_status([job(prefetch=True), prefetch_job], [pulling, pending_pod(NO_GPUS, of=job(prefetch=True))])
    assert (state.phase, state.stage, state.node, state.reason.split(" (")[0]) == (
        "pulling ahead",
        "pull",
        "cpu-1",
        "no node has 2 free nvidia.com/gpu",
    )


def test_running_training_pod_takes_precedence_over_the_prefetch_job():
    prefetch_job = failed_job(failed_by_policy("pull", 2, role="prefetch"), role="prefetch")
    assert summary(read_status([job(prefetch=True), prefetch_job], [pod({"pull": running()})])) == (
        "running",
        "pull",
        None,
        None,
        None,
    )


def test_prefetched_dataset_without_training_job_is_pending():
    prefetch_job = job(success_criteria_met(), role="prefetch")
    pulled = pod({"pull": done("pull")}, of=prefetch_job, phase="Succeeded")
    assert summary(read_status(prefetch_job, [pulled])) == (
        "pending",
        "pull",
        "the dataset is pulled; submit the job again to train",
        None,
        None,
    )


def test_events_of_an_earlier_job_with_the_same_name_are_ignored():
    other = job()
    other["metadata"] = other["metadata"] | {"uid": "of an earlier one"}
    failed_create = event(other, "FailedCreate", "Error creating: something old")
    assert read_status(job(), events=[failed_create]).reason is None


def test_pod_whose_containers_are_being_created_is_pending():
    creating = pod({"pull": waiting("ContainerCreating")}, phase="Pending")
    assert summary(read_status(job(), [creating])) == ("pending", None, None, None, None)


def test_injected_containers_are_not_stages():
    pod_with_sidecar = pod({"pull": running()})
    pod_with_sidecar["spec"]["containers"].append({"name": "istio-proxy", "image": "istio"})
    pod_with_sidecar["status"]["containerStatuses"].append({"name": "istio-proxy", "state": waiting()})
    (attempt,) = read_status(job(), [pod_with_sidecar]).attempts
    assert [container.stage for container in attempt.containers] == ["pull", "transfer", "fine-tune"]
