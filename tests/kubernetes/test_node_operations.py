"""Submitting, following, canceling and reading the logs of runs on several nodes."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import sample_objects
from access import Access, granted_access, required_access
from api_server import ApiServer
from ruamel.yaml import YAML
from sample_objects import IMAGE, PULLED, RUN, TRANSFERRED, done, epoch_line, running, transfer_job
from sample_transfer_jobs import PENDING, put_transfer_job
from simulated_cluster import Command, SimulatedCluster, write_spec
from simulated_controllers import SimulatedControllers

from topwork.client import wait
from topwork.clients.kubernetes.cluster import Cluster
from topwork.cluster.definition import definition
from topwork.cluster.manifests.render import RenderOptions, render
from topwork.cluster.operations.cancel import Cancellation
from topwork.cluster.operations.follow import RunFollower
from topwork.cluster.operations.logs import ContainerHeading, Note, RunLog
from topwork.cluster.operations.node_logs import NodeEntry, NodeLogs
from topwork.cluster.operations.submit import Outcome, Submission
from topwork.cluster.status.run_status import RunStatus
from topwork.errors import SettingError

SUBMITTER = Path(__file__).parents[2] / "k8s" / "base" / "submitter.yaml"
SERVICE = f"topwork-{RUN}"
PODS = [f"{RUN}-{index}-abcde" for index in (0, 1)]
NETWORK_ACCESS = {("", "services"), ("networking.k8s.io", "networkpolicies")}


@pytest.fixture
def simulated(api_server: ApiServer) -> SimulatedCluster:
    """A cluster with the Job of a run on two nodes, but no pod yet."""
    api_server.put(sample_objects.job(nodes=2))
    return SimulatedCluster(api_server)


def submit(cluster: Cluster, nodes: int = 2, **options: Any) -> Outcome:
    rendered = render(transfer_job(nodes=nodes), RenderOptions(IMAGE, "team-a"))
    return Submission(cluster, rendered, lambda _: None, timeout_seconds=1.0).submit(**options)


def owners(server: ApiServer, kind: str, name: str) -> list[str]:
    obj = server.get(kind, name)
    assert obj
    return [owner["uid"] for owner in obj["metadata"].get("ownerReferences", ())]


def objects(server: ApiServer) -> list[str]:
    kinds = ("Job", "Pod", "ConfigMap", "Service", "NetworkPolicy")
    return [f"{kind} {obj['metadata']['name']}" for kind in kinds for obj in server.list(kind)]


# ── Submission ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_service_and_network_policy_are_applied_before_the_job_that_owns_them(api_server: ApiServer, cluster: Cluster):
    assert submit(cluster) == "submitted"
    written = [request.path.split("/")[-2:] for request in api_server.requests if request.method == "PATCH"]
    assert written[:4] == [["configmaps", RUN], ["services", SERVICE], ["networkpolicies", RUN], ["jobs", RUN]]
    job = api_server.get("Job", RUN)
    assert job
    for kind, name in (("ConfigMap", RUN), ("Service", SERVICE), ("NetworkPolicy", RUN)):
        assert owners(api_server, kind, name) == [job["metadata"]["uid"]]


def test_deleting_the_job_deletes_what_it_owns(api_server: ApiServer, cluster: Cluster):
    controllers = SimulatedControllers(api_server, shutdown_seconds=10)
    submit(cluster)
    controllers.settle()
    cluster.delete("Job", RUN, propagation="Foreground")
    controllers.advance(20)
    assert objects(api_server) == []


def test_a_failed_run_is_replaced_with_new_objects(api_server: ApiServer, cluster: Cluster):
    submit(cluster)
    before = api_server.get("Job", RUN)
    SimulatedCluster(api_server).patch_job_status(sample_objects.backoff_limit_exceeded(), failed=8)
    assert submit(cluster) == "replaced"
    after = api_server.get("Job", RUN)
    assert before and after and before["metadata"]["uid"] != after["metadata"]["uid"]
    for kind, name in (("Service", SERVICE), ("NetworkPolicy", RUN)):
        assert owners(api_server, kind, name) == [after["metadata"]["uid"]]


def test_objects_whose_job_is_gone_are_replaced(api_server: ApiServer, cluster: Cluster):
    submit(cluster)
    stale = {kind: owners(api_server, kind, name) for kind, name in (("Service", SERVICE), ("NetworkPolicy", RUN))}
    api_server.remove("Job", RUN)
    submit(cluster)
    for kind, name in (("Service", SERVICE), ("NetworkPolicy", RUN)):
        assert not {*owners(api_server, kind, name)} & {*stale[kind]}


def test_a_service_of_someone_else_is_not_replaced(api_server: ApiServer, cluster: Cluster):
    api_server.put({"apiVersion": "v1", "kind": "Service", "metadata": {"name": SERVICE}, "spec": {}})
    with pytest.raises(SettingError, match=f"service/{SERVICE} in namespace team-a is not managed by topwork"):
        submit(cluster)
    assert api_server.list("Job") == []


def test_another_number_of_nodes_is_a_different_setting(cluster: Cluster):
    submit(cluster)
    with pytest.raises(SettingError, match=r"different settings: spec.compute.nodes: 2 → 4"):
        submit(cluster, nodes=4)


def test_runs_on_one_node_need_no_access_to_services_and_policies(api_server: ApiServer, cluster: Cluster):
    submit(cluster, nodes=1)
    Cancellation(cluster, RUN, now=False, report=lambda _: None).cancel()
    used = {(access.group, access.resource) for access in required_access(api_server.requests)}
    assert not used & NETWORK_ACCESS


def test_submission_and_cancellation_need_only_the_permissions_of_submitters(api_server: ApiServer, cluster: Cluster):
    submit(cluster)
    Cancellation(cluster, RUN, now=False, report=lambda _: None).cancel()
    role = next(obj for obj in YAML(typ="safe").load_all(SUBMITTER) if obj["kind"] == "Role")
    needed = required_access(api_server.requests)
    assert needed <= granted_access(role["rules"])
    assert {Access(verb, *kind) for verb in ("get", "patch", "delete") for kind in NETWORK_ACCESS} <= needed


# ── Cancellation ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_cancellation_deletes_what_connects_the_nodes_after_their_checkpoint(api_server: ApiServer, cluster: Cluster):
    submit(cluster)
    job = api_server.get("Job", RUN)
    for index in (0, 1):
        api_server.put(sample_objects.pod(PULLED | {"transfer": running(100)}, of=job, index=index))
    api_server.hold_deletions = True
    reports: list[str] = []

    def report(line: str) -> None:
        reports.append(line)
        assert api_server.get("Service", SERVICE)
        assert api_server.get("NetworkPolicy", RUN)
        api_server.finish_deletions()

    # As in namespaces whose garbage collector is slow: the owner references alone delete nothing.
    for kind, name in (("Service", SERVICE), ("NetworkPolicy", RUN)):
        api_server.patch(kind, name, {"metadata": {"ownerReferences": None}})
    Cancellation(cluster, RUN, now=False, report=report).cancel()
    assert reports == [f"waiting for pod/{PODS[0]} to write its checkpoint (at most 300 s)"]
    assert objects(api_server) == []


def test_cancellation_deletes_a_submission_that_was_interrupted_before_its_job(api_server: ApiServer, cluster: Cluster):
    rendered = render(transfer_job(nodes=2), RenderOptions(IMAGE, "team-a"))
    for obj in (rendered.config_map, *rendered.network):
        cluster.apply(obj)
    Cancellation(cluster, RUN, now=False, report=lambda _: None).cancel()
    assert objects(api_server) == []


# ── Logs ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def lines_of(entries: Iterable[ContainerHeading | str | Note]) -> list[str]:
    return [entry for entry in entries if isinstance(entry, str)]


def put_pods(simulated: SimulatedCluster) -> None:
    for index, pod in enumerate(PODS):
        simulated.put_pod(PULLED | {"transfer": running(100)}, index=index)
        for stage in ("pull", "transfer"):
            simulated.server.append_log(pod, stage, f"{stage} of {index}")


def test_logs_are_those_of_node_0(simulated: SimulatedCluster, topwork: Callable[..., Any]):
    put_pods(simulated)
    assert topwork("logs", "flowers") == (
        0,
        ["pull of 0", "transfer of 0", f"── {PODS[0]} pull ──", f"── {PODS[0]} transfer ──"],
    )


def test_logs_of_another_node(simulated: SimulatedCluster, topwork: Callable[..., Any]):
    put_pods(simulated)
    assert topwork("logs", "flowers", "--node", "1", "--stage", "transfer") == (
        0,
        ["transfer of 1", f"── {PODS[1]} transfer ──"],
    )


def test_logs_of_all_nodes_start_with_the_node(simulated: SimulatedCluster, topwork: Callable[..., Any]):
    put_pods(simulated)
    code, lines = topwork("logs", "flowers", "--node", "all", "--stage", "transfer")
    assert (code, lines[:2]) == (0, ["[node 0] transfer of 0", "[node 1] transfer of 1"])


@pytest.mark.parametrize("node", ["2", "-1", "01", "x"])
def test_logs_refuse_an_unknown_node(simulated: SimulatedCluster, topwork: Callable[..., Any], node: str):
    code, lines = topwork("logs", "flowers", "--node", node)
    assert (code, lines) == (
        2,
        [f"topwork: --node is {node}, expected an index from 0 to 1, or all: {RUN} has 2 nodes."],
    )


def test_logs_of_one_node_have_no_other_node(api_server: ApiServer, topwork: Callable[..., Any]):
    api_server.put(sample_objects.job())
    code, lines = topwork("logs", "flowers", "--node", "1")
    assert (code, lines) == (2, [f"topwork: --node is 1, expected 0: {RUN} has one node."])


def test_logs_of_a_node_that_has_not_started(simulated: SimulatedCluster, topwork: Callable[..., Any]):
    simulated.put_pod({"pull": running()}, index=0)
    simulated.put_pending_pod("no GPUs", index=1)
    code, lines = topwork("logs", "flowers", "--node", "1")
    assert (code, lines) == (75, [f"node 1 of {RUN} has not started yet: 1 of 2 pods is pending: no GPUs."])


def test_followed_log_of_another_node_ends_with_its_pod(simulated: SimulatedCluster, cluster: Cluster):
    put_pods(simulated)
    log = RunLog(cluster, RUN, node=1).follow()
    seen = [next(log) for _ in range(4)]
    assert lines_of(seen) == ["pull of 1", "transfer of 1"]
    finished = TRANSFERRED | {"fine-tune": done("fine-tune")}
    simulated.put_pod(finished, index=1, phase="Succeeded")
    assert [entry.stage for entry in log if isinstance(entry, ContainerHeading)] == ["fine-tune"]


def test_followed_logs_of_all_nodes_are_merged(simulated: SimulatedCluster, cluster: Cluster):
    put_pods(simulated)
    entries = NodeLogs([RunLog(cluster, RUN, "transfer", node=index) for index in (0, 1)]).follow()
    seen: set[NodeEntry] = set()
    # Neither log ends, so that both are read at the same time.
    while len(seen) < 4:
        seen.add(next(entries))
    assert {entry for entry in seen if isinstance(entry.entry, str)} == {
        NodeEntry(0, "transfer of 0"),
        NodeEntry(1, "transfer of 1"),
    }
    for index in (0, 1):
        simulated.put_pod(TRANSFERRED, index=index)
    assert [*entries] == []


def test_an_error_of_one_of_several_followed_logs_is_raised(simulated: SimulatedCluster, cluster: Cluster):
    put_pods(simulated)
    simulated.server.allow([{"apiGroups": ["batch"], "resources": ["jobs"], "verbs": ["list"]}])
    with pytest.raises(SettingError, match="list pods"):
        [*NodeLogs([RunLog(cluster, RUN, node=index) for index in (0, 1)]).follow()]


# ── Following ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_followed_run_explains_a_missing_node_although_another_one_runs(
    simulated: SimulatedCluster, cluster: Cluster
):
    simulated.put_pod({"pull": running()}, index=0)
    statuses = RunFollower(cluster, RUN).statuses()
    first = next(statuses)
    assert isinstance(first, RunStatus)
    assert first.reason == "1 of 2 pods is pending"
    simulated.put_event(simulated.wait_for_job(), "FailedCreate", sample_objects.QUOTA)
    reason = next(
        status.reason for status in statuses if isinstance(status, RunStatus) and status.reason != first.reason
    )
    assert str(reason).startswith("1 of 2 pods is pending: exceeded quota gpus")
    statuses.close()


def test_submit_follow_shows_the_epochs_of_node_0(api_server: ApiServer, kubeconfig: Path, tmp_path: Path):
    spec = write_spec(tmp_path / "flowers.yaml", nodes=2)
    simulated = SimulatedCluster(api_server)
    with Command("submit", str(spec), "--as", "job", "--follow", kubeconfig=kubeconfig) as command:
        simulated.wait_for_job()
        for index in (1, 0):
            simulated.put_pod(PULLED | {"transfer": running(100)}, index=index)
        api_server.append_log(PODS[1], "transfer", epoch_line("transfer", 4, 5, 0.1))
        api_server.append_log(PODS[0], "transfer", epoch_line("transfer", 1, 5, 0.8))
        command.expect("transfer epoch 1/5: validation_accuracy 0.8000")
        simulated.put_pod(TRANSFERRED | {"fine-tune": sample_objects.published()}, index=0, phase="Succeeded")
        simulated.complete_job()
        assert command.wait() == 0
    assert "epoch 4/5" not in command.output
    assert command.lines[-1] == f"model {sample_objects.MODEL}"


# ── TransferJobs ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_logs_know_the_nodes_of_a_transfer_job_without_a_job(api_server: ApiServer, topwork: Callable[..., Any]):
    api_server.install_crd(definition())
    put_transfer_job(api_server, PENDING, nodes=2)
    code, lines = topwork("logs", "flowers", "--node", "1")
    assert (code, lines) == (75, [f"node 1 of {RUN} has not started yet: the queue team-a has no free GPUs."])


def test_status_of_a_finished_transfer_job_shows_its_nodes(api_server: ApiServer, topwork: Callable[..., Any]):
    api_server.install_crd(definition())
    records = [
        {"pod": f"{RUN}-{index}-abcde", "uid": str(index), "node": f"gpu-{index}", "index": index, "attempt": 2}
        | {"exitCode": 75 - 75 * index, "gpuSeconds": 1.0}
        for index in (1, 0)
    ]
    current = PENDING | {"state": "Failed", "attempts": 2, "attemptHistory": records, "error": "node 0: no storage"}
    put_transfer_job(api_server, current, nodes=2)
    code, lines = topwork("status", "flowers")
    assert code == 0
    assert [line.split()[:4] for line in lines if line.startswith(("0 ", "1 "))] == [
        ["0", f"{RUN}-0-abcde", "gpu-0", "failed"],
        ["1", f"{RUN}-1-abcde", "gpu-1", "done"],
    ]
    assert "  error     node 0: no storage" in lines


def test_client_waits_for_a_run_on_several_nodes(api_server: ApiServer, kubeconfig: Path):
    api_server.install_crd(definition())
    put_transfer_job(api_server, completed(), nodes=2)
    final = wait("flowers", timeout_seconds=10, kubeconfig=kubeconfig)
    assert [(record.index, record.attempt) for record in final.attempt_history] == [(0, 1), (1, 1)]


def completed() -> dict[str, Any]:
    records = [{"pod": f"{RUN}-{index}-abcde", "uid": str(index), "index": index, "attempt": 1} for index in (0, 1)]
    return PENDING | {"state": "Complete", "waitingFor": None, "exitCode": 0, "attemptHistory": records}
