"""Runs on two nodes: two pods, possibly on one machine, from their submission to a published model, and failures."""

import json
import time

import pytest
from tests.cluster.environment import DELETION_SECONDS, EVENT_SECONDS, RUN_SECONDS, START_SECONDS
from tests.cluster.kubectl import Kubectl, wait_for
from tests.cluster.runs import Run

from topwork.clients.kubernetes import KubernetesObject
from topwork.cluster.names import RUN_LABEL, STAGES, service_name

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(4 * RUN_SECONDS)]

FINE_TUNE = {"epochs": 1, "unfreeze": "all", "optimizer": {"name": "adam", "learningRate": 0.0001}}
LONG_TRAINING = {"train": "all", "epochs": 10_000, "batchSize": 8, "featureCache": "off"}
# Long enough to be killed after the first epochs, short enough to finish.
MEDIUM_TRAINING = LONG_TRAINING | {"epochs": 300}
TWO_NODES = {"nodes": 2}
INDEX = "batch.kubernetes.io/job-completion-index"
# A node that is late by this time is awaited, not given up.
LATE_SECONDS = 45.0


def pods_of_node(run: Run, index: int) -> list[KubernetesObject]:
    """Return the pods of a node, oldest first."""
    return [pod for pod in run.pods() if pod["metadata"]["annotations"][INDEX] == str(index)]


def wait_for_node(run: Run, index: int, *, other_than: str | None = None) -> str:
    """Wait for a pod of a node that has not ended, and return its name."""

    def find() -> str | None:
        for pod in reversed(pods_of_node(run, index)):
            is_ending = "deletionTimestamp" in pod["metadata"] or pod["status"].get("phase") == "Failed"
            if not is_ending and pod["metadata"]["name"] != other_than:
                return str(pod["metadata"]["name"])
        return None

    return wait_for(find, f"a pod of node {index} of {run.object_name}", seconds=START_SECONDS)


def limit_pods(kubectl: Kubectl, count: int) -> None:
    """Let a namespace have at most this many pods."""
    hard = {"pods": str(count)}
    kubectl.apply({"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "pods"}, "spec": {"hard": hard}})

    def is_used() -> bool:
        stored = kubectl.get("resourcequota", "pods") or {}
        return stored.get("status", {}).get("hard", {}).get("pods") == str(count)

    wait_for(is_used, "usage of the quota", seconds=60)


@pytest.fixture(scope="module")
def published(make_shared_run, topwork) -> Run:
    """A run on two nodes that was submitted and followed until it finished."""
    run = make_shared_run(fineTune=FINE_TUNE, compute=TWO_NODES)
    result = topwork("submit", run.file, "--follow")
    assert result.exit_code == 0, result.output
    assert f"{run.job.spec.storage}/models/{run.name}/1" in result.output
    assert "node 1 started on machine" in result.output
    return run


@pytest.fixture
def train(make_run, topwork):
    """Function that submits a run on two nodes and waits for some epochs; returns the run and the epoch numbers."""

    def start(transfer=LONG_TRAINING, **compute):
        run = make_run(transfer=transfer, compute=TWO_NODES | compute)
        submitted = topwork("submit", run.file)
        assert submitted.exit_code == 0, submitted.output
        return run, run.wait_for_epochs(wait_for_node(run, 0), 3)

    return start


# ── A complete run ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.smoke
def test_success_of_node_0_completes_the_job(published):
    assert published.condition("Complete")["reason"] == "SuccessPolicy"
    assert published.failures() == 0
    assert [len(pods_of_node(published, index)) for index in (0, 1)] == [1, 1]


def test_only_node_0_publishes(published):
    messages = [published.termination_messages(pods_of_node(published, index)[0]) for index in (0, 1)]
    assert messages[0].keys() == {*STAGES}
    assert messages[0]["fine-tune"].model == f"{published.job.spec.storage}/models/{published.name}/1"
    # The second pod may be deleted before it ends by itself.
    assert [message.model for message in messages[1].values() if message] == [None] * len(messages[1])


def test_status_and_logs_show_both_nodes(published, topwork):
    status = json.loads(topwork("status", published.name, "--json").stdout)
    assert (status["phase"], status["nodes"]) == ("succeeded", 2)
    assert sorted(attempt["index"] for attempt in status["attempts"]) == [0, 1]
    first = topwork("logs", published.name, "--stage", "transfer")
    assert (first.exit_code, '"epoch"' in first.stdout) == (0, True), first.output
    both = topwork("logs", published.name, "--stage", "transfer", "--node", "all")
    assert both.exit_code == 0, both.output
    assert "[node 0] {" in both.stdout
    assert "[node 1] {" in both.stdout


def test_deleting_the_job_deletes_service_and_network_policy(make_run, topwork, namespace):
    run = make_run(transfer=LONG_TRAINING, compute=TWO_NODES)
    assert topwork("submit", run.file).exit_code == 0
    assert namespace.get("service", service_name(run.job))
    assert namespace.get("networkpolicy", run.object_name)
    namespace("delete", "job", run.object_name, "--cascade=foreground", "--timeout=200s", seconds=DELETION_SECONDS)
    selector = f"{RUN_LABEL}={run.object_name}"
    wait_for(
        lambda: not namespace.items("service,networkpolicy,configmap,pod", selector),
        f"deletion of all objects of {run.object_name}",
        seconds=DELETION_SECONDS,
    )


def test_controller_runs_a_transfer_job_on_two_nodes(make_transfer_job):
    run = make_transfer_job(compute=TWO_NODES)
    run.apply()
    status = run.wait_for_state("Complete")
    assert (status.attempts, status.failures, status.gpus) == (1, 0, 0)
    assert sorted(record.index for record in status.attempt_history) == [0, 1]
    assert status.model == f"{run.job.spec.storage}/models/{run.name}/1"


def test_controller_restores_a_deleted_network_policy(make_transfer_job):
    run = make_transfer_job(transfer=LONG_TRAINING, compute=TWO_NODES)
    run.apply()
    run.wait_for_epochs(wait_for_node(run, 0))
    run.kubectl("delete", "networkpolicy", run.object_name)
    wait_for(
        lambda: run.kubectl.get("networkpolicy", run.object_name), "the NetworkPolicy again", seconds=EVENT_SECONDS
    )


# ── Killed, slow and missing pods ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("index", [0, 1])
def test_killed_pod_ends_the_attempt_and_the_next_one_publishes(train, topwork, namespace, index):
    run, _ = train(MEDIUM_TRAINING)
    pods = [wait_for_node(run, node) for node in (0, 1)]
    followed = topwork.start("status", run.name, "--follow")
    namespace("delete", "pod", pods[index], "--grace-period=0", "--force", "--wait=false")
    # The other pod does not survive its peer.
    other = 1 - index
    wait_for(
        lambda: pods_of_node(run, other)[0]["status"].get("phase") == "Failed",
        f"end of {pods[other]}",
        seconds=EVENT_SECONDS,
    )
    chief = wait_for_node(run, 0, other_than=pods[0])
    assert run.wait_for_epochs(chief)[0] > 1
    result = followed.wait(seconds=2 * RUN_SECONDS)
    assert result.exit_code == 0, result.output
    assert f"{run.job.spec.storage}/models/{run.name}/1" in result.output


@pytest.mark.parametrize("index", [0, 1])
def test_stopped_pod_stops_both_with_a_checkpoint_and_is_not_counted(train, namespace, index):
    run, epochs = train(retries=0)
    pods = [wait_for_node(run, node) for node in (0, 1)]
    namespace("delete", "pod", pods[index], "--wait=false")
    chief = wait_for_node(run, 0, other_than=pods[0])
    assert run.wait_for_epochs(chief)[0] > epochs[-1]
    assert run.failures() == 0


@pytest.mark.parametrize("is_late", [True, False], ids=["slow", "missing"])
def test_second_pod_that_is_slow_or_missing_is_awaited_and_explained(
    make_run, make_namespace, topwork, pod_storage, is_late
):
    other = make_namespace(pod_storage)
    limit_pods(other, 1)
    compute = TWO_NODES | ({} if is_late else {"deadlineSeconds": 300})
    run = make_run(namespace=other, compute=compute)
    followed = topwork.start("submit", run.file, "--follow", namespace=other.namespace)
    followed.wait_for("1 of 2 pods is pending", "exceeded quota pods", seconds=START_SECONDS)
    # Node 0 pulls, and then waits in transfer.
    name = run.wait_for_pod()
    wait_for(lambda: "transfer" in run.log(name, "transfer"), f"start of transfer in {name}", seconds=START_SECONDS)
    if is_late:
        time.sleep(LATE_SECONDS)
        limit_pods(other, 10)
        result = followed.wait(seconds=2 * RUN_SECONDS)
        assert result.exit_code == 0, result.output
        assert run.failures() == 0
        assert len(run.pods()) == 2
    else:
        result = followed.wait(seconds=RUN_SECONDS)
        assert result.exit_code == 75, result.output
        assert "deadlineSeconds" in result.output
        assert run.epochs(name) == []
