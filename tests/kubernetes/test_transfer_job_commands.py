"""`topwork status`, `list`, `logs`, `top` and `cancel` of TransferJobs; the tests write their status."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import api_statuses
import pytest
import sample_objects
import sample_transfer_jobs as samples
from api_server import ApiServer
from api_statuses import Fault
from sample_objects import MODEL, PULLED, RUN, running
from sample_transfer_jobs import put_job, put_transfer_job, set_status
from simulated_cluster import Command, SimulatedCluster, wait_for

from topwork.cluster.definition import definition
from topwork.cluster.status import transfer_job_run

Topwork = Callable[..., tuple[int, list[str]]]
POD = f"{RUN}-abcde"


@pytest.fixture
def server(api_server: ApiServer) -> ApiServer:
    """An API server that serves TransferJobs."""
    api_server.install_crd(definition())
    return api_server


@pytest.fixture
def cancel(kubeconfig: Path) -> Callable[..., Command]:
    def start(*arguments: str) -> Command:
        return Command("cancel", *arguments, kubeconfig=kubeconfig)

    return start


def put_running(server: ApiServer) -> None:
    """A TransferJob that trains: its Job and a pod."""
    put_job(server, put_transfer_job(server, samples.status("Running", stage="transfer", eta="1h5m")))
    SimulatedCluster(server).put_pod(PULLED | {"transfer": running(100)})


# status and list


def test_pending_transferjob_is_shown_with_what_it_waits_for(topwork: Topwork, server: ApiServer):
    put_transfer_job(server, samples.PENDING)
    code, lines = topwork("status", "flowers")
    assert code == 0
    assert lines[0] == f"{RUN} in namespace team-a: pending"
    assert "  state     Pending" in lines
    assert "  reason    the queue team-a has no free GPUs" in lines
    assert lines[-1] == f"stop    topwork cancel {RUN} -n team-a"


def test_suspended_transferjob_is_shown_with_its_progress(topwork: Topwork, server: ApiServer):
    put_transfer_job(server, samples.SUSPENDED)
    code, lines = topwork("list")
    assert code == 0
    assert lines[1].split()[:4] == ["flowers", RUN, "transfer", "3/20"]
    assert "validation_accuracy 0.9100" in lines[1]
    assert lines[1].endswith("suspended: spec.suspend is true")


def test_complete_transferjob_without_a_job_keeps_its_outcome(topwork: Topwork, server: ApiServer):
    put_transfer_job(server, samples.COMPLETE)
    code, lines = topwork("status", RUN)
    assert code == 0
    assert lines[0] == f"{RUN} in namespace team-a: succeeded"
    assert f"  model     {MODEL}" in lines
    assert "  gpu time  2.00 GPU-hours" in lines
    assert lines[-1] == f"see  topwork models show {MODEL.rstrip('/')}"


def test_invalid_spec_is_shown_with_all_problems(topwork: Topwork, server: ApiServer):
    put_transfer_job(server, samples.INVALID)
    code, lines = topwork("status", "tj/flowers")
    assert code == 0
    assert lines[0] == "transferjob/flowers in namespace team-a: failed with exit code 2"
    start = lines.index("  error     spec.a: wrong")
    assert lines[start + 1] == "            spec.b: wrong, too"
    assert topwork("list")[1][1].endswith("failed (2): spec.a: wrong spec.b: wrong, too")


def test_running_job_of_a_transferjob_is_shown_with_what_only_the_transferjob_knows(
    topwork: Topwork, server: ApiServer
):
    put_running(server)
    rejected = samples.condition("Accepted", "False", "InvalidSpec", "spec.a: wrong")
    set_status(server, samples.status("Running", rejected, stage="transfer", eta="1h5m"))
    code, lines = topwork("status", "flowers")
    assert code == 0
    assert lines[0] == f"{RUN} in namespace team-a: running, transfer"
    assert "  eta       1h5m" in lines
    assert "  note      the spec is not accepted (InvalidSpec): spec.a: wrong" in lines
    assert any(line.startswith("transfer    running") for line in lines)
    assert topwork("status", f"job.batch/{RUN}") == (code, lines)


def test_transferjob_that_no_controller_processes_names_the_likely_cause(topwork: Topwork, server: ApiServer):
    put_transfer_job(server)
    server.patch("TransferJob", "flowers", {"metadata": {"creationTimestamp": sample_objects.at(0)}})
    _, lines = topwork("status", "flowers")
    assert lines[0] == "transferjob/flowers in namespace team-a: pending"
    reason = next(line for line in lines if line.startswith("  reason"))
    assert "no controller has processed it: topwork-controller does not run, or does not watch this namespace" in reason
    assert reason.endswith(transfer_job_run.CONTROLLER_COMMAND)


def test_changed_spec_of_a_complete_transferjob_is_pending_until_the_controller_has_processed_it(
    topwork: Topwork, server: ApiServer
):
    put_transfer_job(server, samples.COMPLETE)
    server.patch("TransferJob", "flowers", {"spec": {"fineTune": {"epochs": 3}}})
    _, lines = topwork("status", "flowers")
    assert lines[0] == f"{RUN} in namespace team-a: pending"
    assert "  reason    the controller has not yet processed generation 2 of the spec" in lines


def test_json_of_a_transferjob_has_the_same_keys_and_its_status(topwork: Topwork, server: ApiServer):
    put_job(server, put_transfer_job(server, samples.status("Running")))
    _, lines = topwork("status", "flowers", "--as", "job", "--json")
    plain = json.loads("\n".join(lines))
    _, lines = topwork("status", "flowers", "--json")
    data = json.loads("\n".join(lines))
    own = data.pop("transferJob")
    assert data == plain
    assert (own["state"], own["run"], own["observedGeneration"]) == ("Running", RUN, 1)


def test_list_shows_each_run_once(topwork: Topwork, server: ApiServer):
    put_running(server)
    other = sample_objects.job()
    other["metadata"] |= {"name": "roses-12345678", "uid": "other"}
    other["metadata"]["labels"] |= {"topwork.dev/job": "roses", "topwork.dev/run": "roses-12345678"}
    server.put(other)
    runs = {
        kind: sorted(line.split()[1] for line in topwork("list", *(["--as", kind] if kind else []))[1][1:])
        for kind in ("", "job", "transferjob")
    }
    assert runs == {"": [RUN, "roses-12345678"], "job": [RUN, "roses-12345678"], "transferjob": [RUN]}


def test_account_without_access_to_transferjobs_still_sees_jobs(topwork: Topwork, server: ApiServer):
    put_running(server)
    denied = api_statuses.rbac_denied("list", "transferjobs", "team-a", group="topwork.dev")
    server.inject(Fault(denied, path="/transferjobs"), times=10)
    code, lines = topwork("list")
    assert code == 0
    assert lines[1].split()[:2] == ["flowers", RUN]
    assert lines[-1].startswith(
        "Note: only the Jobs of TransferJobs are listed: alice is not allowed to list transferjobs in namespace team-a."
    )
    assert topwork("status", "flowers")[0] == 0
    code, lines = topwork("list", "--as", "transferjob")
    assert (code, lines[0].startswith("topwork: alice is not allowed to list transferjobs")) == (2, True)


def test_unknown_name_lists_transferjobs_without_a_job(topwork: Topwork, server: ApiServer):
    put_transfer_job(server, samples.PENDING)
    expected = f"topwork: no job or run roses in namespace team-a. Existing runs: {RUN}."
    assert topwork("status", "roses") == (2, [expected])
    assert topwork("status", "flowers", "--as", "job")[0] == 2


def test_progress_of_a_running_job_comes_from_its_transferjob_if_the_log_has_none(topwork: Topwork, server: ApiServer):
    put_running(server)
    progress = {"progress": "3/20 epochs", "metric": "validation_accuracy 0.9100"}
    set_status(server, samples.status("Running", stage="transfer", **progress))
    assert topwork("list")[1][1].split()[:6] == ["flowers", RUN, "transfer", "3/20", "validation_accuracy", "0.9100"]
    set_status(server, samples.status("Running", stage="pull", **progress))
    assert "3/20" not in topwork("list")[1][1]


@pytest.mark.parametrize(("compute", "shown"), [({"retries": None}, ""), ({"retries": 5}, " (retries: 5)")])
def test_retries_are_shown_only_if_they_are_known(
    topwork: Topwork, server: ApiServer, compute: dict[str, Any], shown: str
):
    put_transfer_job(server, samples.FAILED)
    server.patch("TransferJob", "flowers", {"spec": {"compute": compute}})
    assert f"  attempts  1, 1 of them counted{shown}" in topwork("status", "flowers")[1]


# follow


def test_follow_ends_with_143_if_the_transferjob_is_deleted(server: ApiServer, kubeconfig: Path):
    put_transfer_job(server, samples.PENDING)
    with Command("status", "flowers", "--follow", kubeconfig=kubeconfig) as command:
        command.expect("pending: ")
        server.remove("TransferJob", "flowers")
        assert command.wait() == 143
    assert command.lines[-1] == "cancelled: transferjob/flowers was deleted"


def test_follow_goes_on_across_a_suspension_to_the_end(server: ApiServer, kubeconfig: Path):
    put_running(server)
    simulated = SimulatedCluster(server)
    with Command("status", "flowers", "--follow", kubeconfig=kubeconfig) as command:
        command.expect("transfer started")
        set_status(server, samples.SUSPENDED)
        server.remove("Pod", POD)
        server.remove("Job", RUN)
        command.expect("suspended: spec.suspend is true")
        obj = set_status(server, samples.status("Running"))
        job = sample_objects.job()
        job["metadata"] |= {"uid": "second", "ownerReferences": samples.owner_references(obj)}
        server.put(job)
        simulated.put_pod(PULLED | {"transfer": running(200)}, suffix="fghij")
        command.expect(f"started on node gpu-1 (pod {RUN}-fghij)")
        server.remove("Pod", f"{RUN}-fghij")
        simulated.finish_run(suffix="fghij")
        assert command.wait() == 0
    assert command.lines[-1] == f"model {MODEL}"


@pytest.mark.parametrize(
    ("status", "code", "last"),
    [
        (samples.COMPLETE, 0, f"model {MODEL}"),
        (samples.FAILED, 2, "failed with exit code 2: no bucket photos"),
        (samples.CANCELLED, 143, "cancelled"),
        (samples.INVALID, 2, "failed with exit code 2: spec.a: wrong"),
    ],
    ids=["complete", "failed", "canceled", "invalid"],
)
def test_follow_of_a_pending_transferjob_ends_with_its_exit_code(
    server: ApiServer, kubeconfig: Path, status: dict[str, Any], code: int, last: str
):
    put_transfer_job(server, samples.PENDING)
    with Command("status", "flowers", "--follow", kubeconfig=kubeconfig) as command:
        command.expect("pending: the queue team-a has no free GPUs")
        set_status(server, {key: value for key, value in status.items() if value is not None})
        assert command.wait() == code
    assert last in command.lines


def test_follow_without_a_controller_names_the_likely_cause(server: ApiServer, kubeconfig: Path):
    put_transfer_job(server)
    server.patch("TransferJob", "flowers", {"metadata": {"creationTimestamp": sample_objects.at(0)}})
    with Command("status", "flowers", "--follow", kubeconfig=kubeconfig) as command:
        command.expect("pending: no controller has processed it: topwork-controller does not run")
        set_status(server, samples.COMPLETE)
        assert command.wait() == 0


def test_follow_replaces_a_run_whose_spec_changes_by_the_new_one(server: ApiServer, kubeconfig: Path):
    put_running(server)
    with Command("status", "flowers", "--follow", kubeconfig=kubeconfig) as command:
        command.expect("transfer started")
        server.patch("TransferJob", "flowers", {"spec": {"seed": 7}})
        # The old run ends before the controller stops it.
        SimulatedCluster(server).finish_run()
        command.expect("pending: the controller has not yet processed generation 2 of the spec")
        set_status(server, samples.status("Complete", generation=2, run="flowers-87654321", model="s3://new/1/"))
        assert command.wait() == 0
    assert command.lines[-1] == "model s3://new/1/"


# logs and top


def test_logs_explain_why_a_transferjob_has_none(topwork: Topwork, server: ApiServer):
    put_transfer_job(server, samples.PENDING)
    assert topwork("logs", "flowers") == (75, [f"{RUN} has not started yet: the queue team-a has no free GPUs."])
    set_status(server, samples.COMPLETE)
    assert topwork("logs", "flowers") == (
        2,
        [f"The log of {RUN} was deleted with its Job; the run is complete."],
    )


def test_logs_of_a_running_transferjob(topwork: Topwork, server: ApiServer):
    put_running(server)
    server.append_log(POD, "transfer", "one", "two")
    server.append_log(POD, "pull", "zero")
    assert topwork("logs", "flowers", "--stage", "transfer") == (0, ["one", "two", f"── {POD} transfer ──"])


def test_followed_log_waits_for_the_job_of_a_transferjob(server: ApiServer, kubeconfig: Path):
    obj = put_transfer_job(server)
    with Command("logs", "flowers", "-f", kubeconfig=kubeconfig) as command:
        set_status(server, samples.PENDING)
        command.expect("waiting: the queue team-a has no free GPUs")
        put_job(server, obj)
        simulated = SimulatedCluster(server)
        simulated.put_pod({"pull": running(10)})
        server.append_log(POD, "pull", "first line")
        command.expect("first line")
        simulated.finish_run()
        assert command.wait() == 0


def test_top_shows_a_pending_transferjob(topwork: Topwork, server: ApiServer):
    put_transfer_job(server, samples.PENDING)
    fast = ("--once", "--interval", "0.2", "-n", "team-a")
    for arguments in ((), ("flowers",), (RUN,)):
        code, lines = topwork("top", *arguments, *fast)
        assert code == 0
        assert lines[0] == f"{RUN} in namespace team-a: pending"
        assert lines[1] == "  reason         the queue team-a has no free GPUs"
    set_status(server, samples.COMPLETE)
    assert topwork("top", *fast) == (0, ["No runs in progress in namespace team-a."])


# cancel


def wait_for_request(server: ApiServer) -> dict[str, Any]:
    """Wait until the cancel annotation is set, and return the TransferJob."""

    def find() -> dict[str, Any] | None:
        obj = server.get("TransferJob", "flowers")
        return obj if obj and "topwork.dev/cancel" in obj["metadata"].get("annotations", {}) else None

    return wait_for(find, "cancel annotation")


def test_cancel_asks_the_controller_and_waits_for_the_checkpoint(server: ApiServer, cancel: Callable[..., Command]):
    put_running(server)
    server.hold_deletions = True
    with cancel("flowers") as command:
        command.expect("waiting for the controller to cancel transferjob/flowers")
        obj = wait_for_request(server)
        assert obj["metadata"]["annotations"]["topwork.dev/cancel"] == RUN
        manager = next(entry for entry in obj["metadata"]["managedFields"] if entry["manager"] == "topwork-cancel")
        assert manager["operation"] == "Apply"
        job = server.get("Job", RUN)
        assert job is not None
        assert "deletionTimestamp" not in job["metadata"]
        server.deletion.delete(server.key("Job", RUN), {"propagationPolicy": "Foreground"})
        command.expect(f"waiting for pod/{POD} to write its checkpoint (at most 300 s)")
        set_status(server, samples.CANCELLED)
        time.sleep(0.3)
        assert command.process.poll() is None
        server.finish_deletions()
        assert command.wait() == 0
    assert command.lines == [
        f"canceling {RUN} in namespace team-a, which was running (transfer)",
        "waiting for the controller to cancel transferjob/flowers",
        f"waiting for pod/{POD} to write its checkpoint (at most 300 s)",
        *[line for line in command.lines if line == f"waiting for job.batch/{RUN} to be deleted"],
        f"{RUN} is canceled",
        "If you submit the same spec again, it resumes from its last checkpoint.",
        "To delete the TransferJob: kubectl delete transferjob flowers -n team-a",
    ]
    assert server.get("TransferJob", "flowers") is not None


def test_cancel_now_kills_pods_only_after_the_controller_has_deleted_the_job(
    server: ApiServer, cancel: Callable[..., Command]
):
    put_running(server)
    server.deletion_seconds = 60.0
    server.hold_deletions = True
    with cancel("flowers", "--now") as command:
        wait_for_request(server)
        time.sleep(0.5)
        assert [pod["metadata"]["name"] for pod in server.list("Pod")] == [POD]
        server.deletion.delete(server.key("Job", RUN), {"propagationPolicy": "Foreground"})
        set_status(server, samples.CANCELLED)
        wait_for(lambda: not server.list("Pod"), "deletion of the pod")
        server.finish_deletions()
        assert command.wait() == 0
    assert "Its progress since the last checkpoint is lost." in command.lines


def test_cancel_of_a_pending_transferjob(server: ApiServer, cancel: Callable[..., Command]):
    put_transfer_job(server, samples.PENDING)
    with cancel("flowers") as command:
        wait_for_request(server)
        set_status(server, samples.CANCELLED)
        assert command.wait() == 0
    assert f"{RUN} is canceled" in command.lines


def test_run_that_completes_before_it_is_canceled_keeps_its_job(server: ApiServer, cancel: Callable[..., Command]):
    put_running(server)
    with cancel("flowers") as command:
        wait_for_request(server)
        SimulatedCluster(server).finish_run()
        set_status(server, samples.COMPLETE)
        assert command.wait() == 0
    assert f"{RUN} succeeded before it was canceled" in command.lines
    assert f"Its model is kept at {MODEL}" in command.lines


def test_cancel_of_a_finished_transferjob_changes_nothing(topwork: Topwork, server: ApiServer):
    put_transfer_job(server, samples.COMPLETE)
    server.requests.clear()
    assert topwork("cancel", "flowers") == (
        0,
        [
            f"nothing to cancel: {RUN} in namespace team-a, which was already complete",
            f"Its model is kept at {MODEL}",
            "To delete the TransferJob: kubectl delete transferjob flowers -n team-a",
        ],
    )
    assert {request.method for request in server.requests} == {"GET"}


def test_job_of_a_transferjob_is_not_canceled_as_a_plain_job(topwork: Topwork, server: ApiServer):
    put_running(server)
    code, lines = topwork("cancel", RUN, "--as", "job")
    assert code == 2
    assert lines[-1] == (
        f"topwork: {RUN} in namespace team-a belongs to transferjob/flowers, whose controller would create its Job "
        "again. Cancel it with: topwork cancel flowers -n team-a"
    )
    assert server.get("Job", RUN) is not None


def test_transferjob_without_a_run_cannot_be_canceled(topwork: Topwork, server: ApiServer):
    put_transfer_job(server)
    assert topwork("cancel", "flowers") == (
        2,
        [
            "topwork: transferjob/flowers in namespace team-a has no run to cancel. To delete the TransferJob: "
            "kubectl delete transferjob flowers -n team-a"
        ],
    )
