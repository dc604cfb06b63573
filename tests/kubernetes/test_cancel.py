"""`topwork cancel` with a simulated cluster."""

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import api_statuses
import pytest
import sample_objects
from api_server import ApiServer, owner_references
from api_statuses import Fault
from sample_objects import MODEL, PULLED, RUN, failed, running
from simulated_cluster import Command, SimulatedCluster, wait_for

from topwork.clients.kubernetes.cluster import Cluster
from topwork.cluster.manifests.render import RenderOptions, render
from topwork.cluster.operations.cancel import Cancellation
from topwork.errors import UnavailableError

POD = f"{RUN}-abcde"
RESUME = "If you submit the same spec again, it resumes from its last checkpoint."


@pytest.fixture
def simulated(api_server: ApiServer) -> SimulatedCluster:
    """A cluster with a run: its Job, its ConfigMap, and a pod that trains."""
    job = api_server.put(sample_objects.job())
    options = RenderOptions(sample_objects.IMAGE, "team-a")
    config_map = render(sample_objects.transfer_job(), options).config_map
    api_server.put(config_map | {"metadata": config_map["metadata"] | {"ownerReferences": owner_references(job)}})
    simulated = SimulatedCluster(api_server)
    simulated.put_pod(PULLED | {"transfer": running(100)})
    return simulated


@pytest.fixture
def cancel(kubeconfig: Path) -> Callable[..., Command]:
    def start(*arguments: str) -> Command:
        return Command("cancel", *arguments, kubeconfig=kubeconfig)

    return start


def remaining_objects(server: ApiServer) -> list[str]:
    return [f"{kind} {obj['metadata']['name']}" for kind in ("Job", "Pod", "ConfigMap") for obj in server.list(kind)]


def deletions(server: ApiServer) -> Iterator[tuple[str, object, object]]:
    for request in server.requests:
        if request.method == "DELETE":
            kind = request.path.split("/")[-2]
            yield kind, request.body.get("propagationPolicy"), request.body.get("gracePeriodSeconds")


def test_cancel_waits_for_the_checkpoint_and_deletes_everything(
    simulated: SimulatedCluster, cancel: Callable[..., Command]
):
    simulated.server.hold_deletions = True
    with cancel("flowers") as command:
        command.expect(f"waiting for pod/{POD} to write its checkpoint")
        pod = simulated.server.get("Pod", POD)
        assert pod is not None
        assert pod["metadata"]["deletionGracePeriodSeconds"] == 300
        assert command.process.poll() is None
        simulated.server.finish_deletions()
        assert command.wait() == 0
    assert command.lines == [
        f"canceling {RUN} in namespace team-a, which was running (transfer)",
        f"waiting for pod/{POD} to write its checkpoint (at most 300 s)",
        f"{RUN} is canceled: all its objects are deleted",
        RESUME,
    ]
    assert remaining_objects(simulated.server) == []
    assert list(deletions(simulated.server)) == [("jobs", "Foreground", None), ("configmaps", "Background", None)]


def test_cancel_now_kills_pods_immediately(simulated: SimulatedCluster, cancel: Callable[..., Command]):
    simulated.server.deletion_seconds = 60.0
    simulated.server.hold_deletions = True
    with cancel(RUN, "--now") as command:
        command.expect("waiting for job.batch/")
        assert [pod["metadata"]["name"] for pod in simulated.server.list("Pod")] == []
        simulated.server.finish_deletions()
        assert command.wait() == 0
    assert command.lines == [
        f"canceling {RUN} in namespace team-a, which was running (transfer)",
        f"waiting for pod/{POD} to be deleted",
        f"waiting for job.batch/{RUN} to be deleted",
        f"{RUN} is canceled: all its objects are deleted",
        "Its progress since the last checkpoint is lost.",
        RESUME,
    ]
    assert ("pods", "Background", 0) in list(deletions(simulated.server))


def test_cancel_deletes_the_prefetch_job_and_a_config_map_without_owner(
    simulated: SimulatedCluster, cancel: Callable[..., Command]
):
    simulated.server.put(sample_objects.job(role="prefetch"))
    simulated.server.patch("ConfigMap", RUN, {"metadata": {"ownerReferences": None}})
    with cancel("flowers") as command:
        assert command.wait() == 0
    assert remaining_objects(simulated.server) == []


def test_cancel_keeps_other_runs(simulated: SimulatedCluster, cancel: Callable[..., Command]):
    other = sample_objects.job()
    other["metadata"] |= {"name": "roses-12345678", "uid": "other"}
    other["metadata"]["labels"] |= {"topwork.dev/job": "roses", "topwork.dev/run": "roses-12345678"}
    simulated.server.put(other)
    with cancel("flowers") as command:
        assert command.wait() == 0
    assert remaining_objects(simulated.server) == ["Job roses-12345678"]


def test_cancel_of_a_complete_run_prints_its_model(simulated: SimulatedCluster, cancel: Callable[..., Command]):
    simulated.finish_run()
    with cancel("flowers") as command:
        assert command.wait() == 0
    assert command.lines == [
        f"canceling {RUN} in namespace team-a, which was already complete",
        f"{RUN} is canceled: all its objects are deleted",
        f"Its model is kept at {MODEL}",
    ]


def test_cancel_of_a_failed_run_prints_its_error(simulated: SimulatedCluster, cancel: Callable[..., Command]):
    simulated.put_pod({"pull": failed("pull", 2, "no bucket photos")}, phase="Failed")
    simulated.patch_job_status(sample_objects.failed_by_policy("pull", 2), failed=1)
    with cancel("flowers") as command:
        assert command.wait() == 0
    assert command.lines == [
        f"canceling {RUN} in namespace team-a, which had failed: no bucket photos",
        f"{RUN} is canceled: all its objects are deleted",
        RESUME,
    ]


def test_cancel_of_a_run_that_never_started(simulated: SimulatedCluster, cancel: Callable[..., Command]):
    simulated.server.remove("Pod", POD)
    with cancel("flowers") as command:
        assert command.wait() == 0
    assert command.lines == [
        f"canceling {RUN} in namespace team-a, which was pending",
        f"{RUN} is canceled: all its objects are deleted",
        "If you submit the same spec again, it resumes from its last checkpoint, if there is one.",
    ]


def test_cancel_deletes_a_remaining_config_map(simulated: SimulatedCluster, cancel: Callable[..., Command]):
    simulated.server.patch("ConfigMap", RUN, {"metadata": {"ownerReferences": None}})
    for kind, name in (("Job", RUN), ("Pod", POD)):
        simulated.server.remove(kind, name)
    with cancel(RUN) as command:
        assert command.wait() == 0
    assert command.lines == [
        f"canceling {RUN} in namespace team-a, of which only the ConfigMap is left",
        f"{RUN} is canceled: all its objects are deleted",
    ]
    assert remaining_objects(simulated.server) == []


def test_cancel_of_an_unknown_name_lists_the_existing_runs(simulated: SimulatedCluster, cancel: Callable[..., Command]):
    with cancel("roses") as command:
        assert command.wait() == 2
    assert command.lines == [f"topwork: no job or run roses in namespace team-a. Existing runs: {RUN}."]
    assert list(deletions(simulated.server)) == []


def test_ctrl_c_does_not_stop_the_cancellation(simulated: SimulatedCluster, cancel: Callable[..., Command]):
    simulated.server.hold_deletions = True
    with cancel("flowers") as command:
        command.expect("waiting for pod/")
        command.process.send_signal(signal.SIGINT)
        assert command.wait() == 130
    assert command.lines[-1] == (
        f"The cancellation continues in the cluster. Check it with: topwork status {RUN} -n team-a"
    )
    job = simulated.server.get("Job", RUN)
    assert job is not None
    assert "deletionTimestamp" in job["metadata"]


def test_cancel_without_permission_is_rejected(simulated: SimulatedCluster, cancel: Callable[..., Command]):
    simulated.server.inject(Fault(api_statuses.rbac_denied("delete", "jobs", "team-a", RUN, "batch"), method="DELETE"))
    with cancel("flowers") as command:
        assert command.wait() == 2
    assert command.lines[-1].startswith("topwork: alice is not allowed to delete jobs in namespace team-a. ")
    assert remaining_objects(simulated.server) == [f"Job {RUN}", f"Pod {POD}", f"ConfigMap {RUN}"]


def test_pod_that_is_not_deleted_is_reported_after_the_timeout(simulated: SimulatedCluster, cluster: Cluster):
    simulated.server.hold_deletions = True
    simulated.server.patch("Pod", POD, {"spec": {"terminationGracePeriodSeconds": 0.2}})
    lines: list[str] = []
    with pytest.raises(UnavailableError) as caught:
        Cancellation(cluster, RUN, False, lines.append, timeout_seconds=0.3).cancel()
    assert str(caught.value) == (
        f"pod/{POD} in namespace team-a is still being deleted. Is its node down? "
        "See kubectl get pods -o wide -n team-a; --now does not wait for the node."
    )


def test_cancel_does_not_wait_for_a_run_submitted_during_cancellation(
    simulated: SimulatedCluster, cluster: Cluster, api_server: ApiServer
):
    """The command waits only for the objects that existed when it started, which it identifies by UID."""
    resubmitted = sample_objects.job()
    resubmitted["metadata"]["uid"] = "another"

    def submit_again(_: str) -> None:
        api_server.finish_deletions()
        api_server.put(resubmitted)

    api_server.hold_deletions = True
    Cancellation(cluster, RUN, False, submit_again).cancel()
    assert [job["metadata"]["uid"] for job in api_server.list("Job")] == ["another"]


def test_cancel_survives_transient_api_server_errors(simulated: SimulatedCluster, cluster: Cluster):
    simulated.server.deletion_seconds = 0.5
    simulated.server.inject(Fault(reset=True), Fault(api_statuses.too_many_requests()), Fault(cut_after_bytes=5))
    Cancellation(cluster, RUN, False, lambda _: None).cancel()
    wait_for(lambda: remaining_objects(simulated.server) == [], "deletion of all objects")
