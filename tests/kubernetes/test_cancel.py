"""`topwork cancel`, of runs of a played cluster."""

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import api_statuses
import pytest
import states
from api_server import ApiServer, owned_by
from api_statuses import Fault
from played import Command, Played, eventually
from states import MODEL, PULLED, RUN, failed, running

from topwork.clients.kubernetes.cluster import Cluster
from topwork.cluster.operations.cancel import Cancelling
from topwork.errors import UnavailableError

POD = f"{RUN}-abcde"
AGAIN = "Submitted again, the same spec goes on from its last checkpoint."


@pytest.fixture
def played(api_server: ApiServer) -> Played:
    """A cluster with a run: its Job, its ConfigMap and a pod that trains."""
    job = api_server.put(states.job())
    config_map = states.render(states.transfer_job(), states.Placement(states.IMAGE, "team-a")).config_map
    api_server.put(config_map | {"metadata": config_map["metadata"] | {"ownerReferences": owned_by(job)}})
    played = Played(api_server)
    played.pod(PULLED | {"transfer": running(100)})
    return played


@pytest.fixture
def cancel(kubeconfig: Path) -> Callable[..., Command]:
    def start(*words: str) -> Command:
        return Command("cancel", *words, kubeconfig=kubeconfig)

    return start


def left(server: ApiServer) -> list[str]:
    return [f"{kind} {each['metadata']['name']}" for kind in ("Job", "Pod", "ConfigMap") for each in server.all(kind)]


def deletions(server: ApiServer) -> Iterator[tuple[str, object, object]]:
    for each in server.requests:
        if each.method == "DELETE":
            kind = each.path.split("/")[-2]
            yield kind, each.body.get("propagationPolicy"), each.body.get("gracePeriodSeconds")


def test_a_run_writes_its_checkpoint_and_is_gone(played: Played, cancel: Callable[..., Command]):
    played.server.hold_deletions = True
    with cancel("flowers") as command:
        command.expect(f"waiting for pod/{POD} to write its checkpoint")
        pod = played.server.get("Pod", POD)
        assert pod is not None
        assert pod["metadata"]["deletionGracePeriodSeconds"] == 300
        assert command.process.poll() is None
        played.server.finish_deletions()
        assert command.end() == 0
    assert command.lines == [
        f"cancelling {RUN} in namespace team-a, which was running (transfer)",
        f"waiting for pod/{POD} to write its checkpoint (at most 300 s)",
        f"{RUN} is cancelled: nothing of it is left in the cluster",
        AGAIN,
    ]
    assert left(played.server) == []
    assert list(deletions(played.server)) == [("jobs", "Foreground", None), ("configmaps", "Background", None)]


def test_now_gives_no_time(played: Played, cancel: Callable[..., Command]):
    played.server.deletion_seconds = 60.0
    played.server.hold_deletions = True
    with cancel(RUN, "--now") as command:
        command.expect("waiting for job.batch/")
        assert [each["metadata"]["name"] for each in played.server.all("Pod")] == []
        played.server.finish_deletions()
        assert command.end() == 0
    assert command.lines == [
        f"cancelling {RUN} in namespace team-a, which was running (transfer)",
        f"waiting for pod/{POD} to go",
        f"waiting for job.batch/{RUN} to go",
        f"{RUN} is cancelled: nothing of it is left in the cluster",
        "The work since its last checkpoint is lost.",
        AGAIN,
    ]
    assert ("pods", "Background", 0) in list(deletions(played.server))


def test_the_job_that_pulls_ahead_and_a_config_map_without_owner_go_too(played: Played, cancel: Callable[..., Command]):
    played.server.put(states.job(role="prefetch"))
    played.server.patch("ConfigMap", RUN, {"metadata": {"ownerReferences": None}})
    with cancel("flowers") as command:
        assert command.end() == 0
    assert left(played.server) == []


def test_other_runs_stay(played: Played, cancel: Callable[..., Command]):
    other = states.job()
    other["metadata"] |= {"name": "roses-12345678", "uid": "other"}
    other["metadata"]["labels"] |= {"topwork.dev/job": "roses", "topwork.dev/run": "roses-12345678"}
    played.server.put(other)
    with cancel("flowers") as command:
        assert command.end() == 0
    assert left(played.server) == ["Job roses-12345678"]


def test_a_complete_run_is_removed_and_says_where_its_model_is(played: Played, cancel: Callable[..., Command]):
    played.finish()
    with cancel("flowers") as command:
        assert command.end() == 0
    assert command.lines == [
        f"cancelling {RUN} in namespace team-a, which was complete already",
        f"{RUN} is cancelled: nothing of it is left in the cluster",
        f"Its model stays at {MODEL}",
    ]


def test_a_failed_run_is_removed_and_says_why_it_had_failed(played: Played, cancel: Callable[..., Command]):
    played.pod({"pull": failed("pull", 2, "no bucket photos")}, phase="Failed")
    played.status(states.by_policy("pull", 2), failed=1)
    with cancel("flowers") as command:
        assert command.end() == 0
    assert command.lines == [
        f"cancelling {RUN} in namespace team-a, which had failed: no bucket photos",
        f"{RUN} is cancelled: nothing of it is left in the cluster",
        AGAIN,
    ]


def test_a_run_that_never_started_is_removed(played: Played, cancel: Callable[..., Command]):
    played.server.remove("Pod", POD)
    with cancel("flowers") as command:
        assert command.end() == 0
    assert command.lines == [
        f"cancelling {RUN} in namespace team-a, which was pending",
        f"{RUN} is cancelled: nothing of it is left in the cluster",
        "Submitted again, the same spec goes on from its last checkpoint, if there is one.",
    ]


def test_a_config_map_that_was_left_alone_is_removed(played: Played, cancel: Callable[..., Command]):
    played.server.patch("ConfigMap", RUN, {"metadata": {"ownerReferences": None}})
    for kind, name in (("Job", RUN), ("Pod", POD)):
        played.server.remove(kind, name)
    with cancel(RUN) as command:
        assert command.end() == 0
    assert command.lines == [
        f"cancelling {RUN} in namespace team-a, of which only the ConfigMap is left",
        f"{RUN} is cancelled: nothing of it is left in the cluster",
    ]
    assert left(played.server) == []


def test_a_name_that_is_none_is_told_with_those_that_are(played: Played, cancel: Callable[..., Command]):
    with cancel("roses") as command:
        assert command.end() == 2
    assert command.lines == [f"topwork: no job or run roses in namespace team-a. There are: {RUN}."]
    assert list(deletions(played.server)) == []


def test_ctrl_c_says_that_cancelling_goes_on(played: Played, cancel: Callable[..., Command]):
    played.server.hold_deletions = True
    with cancel("flowers") as command:
        command.expect("waiting for pod/")
        command.process.send_signal(signal.SIGINT)
        assert command.end() == 130
    assert command.lines[-1] == (
        f"Cancelling goes on in the cluster. See how far it is with: topwork status {RUN} -n team-a"
    )
    job = played.server.get("Job", RUN)
    assert job is not None
    assert "deletionTimestamp" in job["metadata"]


def test_a_role_that_is_missing_is_told(played: Played, cancel: Callable[..., Command]):
    played.server.plant(Fault(api_statuses.rbac("delete", "jobs", "team-a", RUN, "batch"), method="DELETE"))
    with cancel("flowers") as command:
        assert command.end() == 2
    assert command.lines[-1].startswith("topwork: alice may not delete jobs in the namespace team-a. ")
    assert left(played.server) == [f"Job {RUN}", f"Pod {POD}", f"ConfigMap {RUN}"]


def test_a_pod_that_does_not_go_is_told_after_its_time(played: Played, cluster: Cluster):
    played.server.hold_deletions = True
    played.server.patch("Pod", POD, {"spec": {"terminationGracePeriodSeconds": 0.2}})
    said: list[str] = []
    with pytest.raises(UnavailableError) as caught:
        Cancelling(cluster, RUN, False, said.append, deletion_seconds=0.3).cancel()
    assert str(caught.value) == (
        f"pod/{POD} in namespace team-a does not go. Is its node lost? "
        "See kubectl get pods -o wide -n team-a; --now does not wait for the node."
    )


def test_a_run_that_is_submitted_again_meanwhile_is_not_waited_for(
    played: Played, cluster: Cluster, api_server: ApiServer
):
    """Only what was there is waited for: the uid tells."""
    again = states.job()
    again["metadata"]["uid"] = "another"

    def submit_again(_: str) -> None:
        api_server.finish_deletions()
        api_server.put(again)

    api_server.hold_deletions = True
    Cancelling(cluster, RUN, False, submit_again).cancel()
    assert [each["metadata"]["uid"] for each in api_server.all("Job")] == ["another"]


def test_an_api_server_that_stutters_does_not_end_cancelling(played: Played, cluster: Cluster):
    played.server.deletion_seconds = 0.5
    played.server.plant(Fault(reset=True), Fault(api_statuses.too_many()), Fault(cut_after=5))
    Cancelling(cluster, RUN, False, lambda _: None).cancel()
    eventually(lambda: left(played.server) == [], "the end of it all")
