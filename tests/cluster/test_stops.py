"""Stopped, killed and evicted runs: the next attempt resumes from the last checkpoint."""

import json

import pytest
from tests.cluster.environment import DELETION_SECONDS, EVENT_SECONDS, RUN_SECONDS
from tests.cluster.kubectl import wait_for
from tests.cluster.manifests import CLOSED_ENDPOINT, unreachable_storage
from tests.cluster.runs import Run

from topwork.cluster.names import RUN_LABEL

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(3 * RUN_SECONDS)]

LONG_TRAINING = {"train": "all", "epochs": 10_000, "batchSize": 8, "featureCache": "off"}
# At least half a minute: long enough to be killed after the first epochs, short enough to finish.
MEDIUM_TRAINING = LONG_TRAINING | {"epochs": 500}


@pytest.fixture
def train(make_run, topwork):
    """Function that submits a run and waits for some epochs; returns the run, its pod and the epoch numbers."""

    def start(namespace=None, **spec):
        run = make_run(namespace=namespace, **{"transfer": LONG_TRAINING, **spec})
        submitted = topwork("submit", run.file, namespace=namespace and namespace.namespace)
        assert submitted.exit_code == 0, submitted.output
        pod = run.wait_for_pod()
        return run, pod, run.wait_for_epochs(pod, 3)

    return start


def checkpoints(run: Run, storage) -> list[str]:
    run_storage = storage.open(run.job.spec.storage)
    checkpoints_of_run = f"/runs/{run.object_name}/checkpoints/"
    return [stored.key for stored in run_storage.list("stages/transfer/") if checkpoints_of_run in stored.key]


@pytest.mark.smoke
def test_cancel_keeps_the_checkpoint_and_submit_resumes(train, topwork, pod_storage):
    run, _, epochs = train()
    canceled = topwork("cancel", run.name, seconds=DELETION_SECONDS)
    assert canceled.exit_code == 0, canceled.output
    run.wait_until_deleted()
    assert checkpoints(run, pod_storage)

    again = topwork("submit", run.file)
    assert again.exit_code == 0, again.output
    resumed = run.wait_for_epochs(run.wait_for_pod())
    assert resumed[0] > epochs[-1]


def test_cancel_now_does_not_wait_for_the_pod(train, topwork):
    run, _, _ = train()
    canceled = topwork("cancel", run.name, "--now", seconds=DELETION_SECONDS)
    assert canceled.exit_code == 0, canceled.output
    run.wait_until_deleted()


def test_cancel_of_an_unknown_run_is_rejected(topwork):
    canceled = topwork("cancel", "never-submitted")
    assert canceled.exit_code == 2, canceled.output
    assert "never-submitted" in canceled.output
    assert "Traceback" not in canceled.output


def test_follow_of_a_canceled_run_exits_with_143(train, topwork):
    run, _, _ = train()
    followed = topwork.start("status", run.name, "--follow")
    followed.wait_for("transfer", seconds=EVENT_SECONDS)
    assert topwork("cancel", run.name, seconds=DELETION_SECONDS).exit_code == 0
    result = followed.wait(seconds=DELETION_SECONDS)
    assert result.exit_code == 143, result.output


def test_failed_attempt_is_counted_and_the_next_one_resumes_and_publishes(train, make_namespace, topwork, pod_storage):
    other = make_namespace(pod_storage)
    run, pod, _ = train(namespace=other, transfer=MEDIUM_TRAINING, compute={"retries": 4})
    followed = topwork.start("status", run.name, "--follow", namespace=other.namespace)
    with unreachable_storage(other, pod_storage.variables):
        # The running container has its own copy of the variables and stores its checkpoint.
        other("delete", "pod", pod, "--wait=false")
        wait_for(lambda: run.failures() >= 1, "a counted failure", seconds=RUN_SECONDS)
    assert run.wait_for_other_epochs(pod)[0] > 1
    result = followed.wait(seconds=RUN_SECONDS)
    assert result.exit_code == 0, result.output
    assert "exit code 75" in result.output
    assert f"{run.job.spec.storage}/models/{run.name}/1" in result.output
    # Failed pods keep their logs, so both attempts are shown.
    logs = topwork("logs", run.name, "--stage", "pull", namespace=other.namespace)
    assert logs.exit_code == 0, logs.output
    assert CLOSED_ENDPOINT in logs.stdout
    assert '"dataset"' in logs.stdout


def test_force_deleted_pod_is_replaced_and_resumes(train, namespace):
    run, pod, _ = train()
    namespace("delete", "pod", pod, "--grace-period=0", "--force", "--wait=false")
    other = run.wait_for_pod(other_than=pod)
    assert run.wait_for_epochs(other)[0] > 1


def test_sigterm_stores_a_checkpoint_and_is_not_counted(train, namespace):
    run, pod, epochs = train()
    namespace("delete", "pod", pod, "--wait=false")
    other = run.wait_for_pod(other_than=pod)
    assert run.wait_for_epochs(other)[0] > epochs[-1]
    assert run.failures() == 0


def test_evicted_pod_is_not_counted_and_follow_reports_the_eviction(train, namespace, topwork):
    run, pod, epochs = train(compute={"retries": 0})
    followed = topwork.start("status", run.name, "--follow")
    followed.wait_for("transfer", seconds=EVENT_SECONDS)
    namespace.evict(pod)
    other = run.wait_for_pod(other_than=pod)
    assert run.wait_for_epochs(other)[0] > epochs[-1]
    # With backoffLimit 0, a single counted failure would fail the Job.
    assert run.failures() == 0
    assert run.condition("Failed") is None
    followed.wait_for("evicted", seconds=EVENT_SECONDS)
    followed.interrupt()


def test_pod_of_a_drained_node_is_replaced_and_resumes(train, namespace):
    run, pod, epochs = train(compute={"retries": 0})
    node = namespace.get("pod", pod)["spec"]["nodeName"]
    cordoned = namespace.get("node", node)["spec"].get("unschedulable", False)
    selector = f"--pod-selector={RUN_LABEL}={run.object_name}"
    try:
        options = ("--delete-emptydir-data", "--ignore-daemonsets", f"--timeout={DELETION_SECONDS:.0f}s")
        namespace("drain", node, selector, *options, seconds=DELETION_SECONDS + 30)
    finally:
        if not cordoned:
            namespace("uncordon", node)
    other = run.wait_for_pod(other_than=pod)
    assert run.wait_for_epochs(other)[0] > epochs[-1]
    assert run.failures() == 0


def test_termination_message_of_a_stopped_container_is_stopped(train, namespace):
    run, pod, _ = train()
    states = namespace.delete_and_watch(pod, seconds=DELETION_SECONDS)
    message = run.termination_messages(states[-1])["transfer"]
    assert (message.stage, message.outcome, message.exit_code) == ("transfer", "stopped", 143)
    assert run.wait_for_other_epochs(pod)[0] > 1
    assert run.failures() == 0


def test_suspended_job_resumes_from_its_checkpoint(train, namespace, topwork):
    run, _, epochs = train()
    namespace("patch", "job", run.object_name, "--patch", json.dumps({"spec": {"suspend": True}}))
    wait_for(lambda: not run.pods(), "deletion of the pod", seconds=DELETION_SECONDS)
    status = topwork("status", run.name)
    assert "suspended" in status.output
    namespace("patch", "job", run.object_name, "--patch", json.dumps({"spec": {"suspend": False}}))
    assert run.wait_for_epochs(run.wait_for_pod())[0] > epochs[-1]
    assert run.failures() == 0


def test_interrupted_submit_does_not_stop_the_job(make_run, topwork):
    run = make_run(transfer=LONG_TRAINING)
    followed = topwork.start("submit", run.file, "--follow")
    run.wait_for_pod()
    followed.wait_for("pull", seconds=EVENT_SECONDS)
    result = followed.interrupt()
    assert result.exit_code == 130, result.output
    assert f"topwork status {run.name}" in result.output
    assert "deletionTimestamp" not in run.kubernetes_job()["metadata"]


def test_failed_run_is_replaced_and_resumes(train, make_namespace, topwork, pod_storage):
    other = make_namespace(pod_storage)
    run, pod, _ = train(namespace=other, compute={"retries": 0})
    with unreachable_storage(other, pod_storage.variables):
        other("delete", "pod", pod, "--wait=false")
        wait_for(lambda: run.condition("Failed"), "failure of the Job", seconds=RUN_SECONDS)
    before = run.kubernetes_job()["metadata"]["uid"]
    again = topwork("submit", run.file, namespace=other.namespace)
    assert again.exit_code == 0, again.output
    assert "checkpoint" in again.output
    assert run.kubernetes_job()["metadata"]["uid"] != before
    assert run.wait_for_other_epochs(pod)[0] > 1


def test_concurrent_submissions_create_one_job(make_run, topwork):
    run = make_run(transfer=LONG_TRAINING)
    commands = [topwork.start("submit", run.file), topwork.start("submit", run.file)]
    results = [command.wait(seconds=EVENT_SECONDS) for command in commands]
    assert [result.exit_code for result in results] == [0, 0], [result.output for result in results]
    run.wait_for_pod()
    assert len(run.pods()) == 1
