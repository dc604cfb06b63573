"""Following runs with a simulated cluster, by `topwork submit --follow`, `topwork status --follow` and RunFollower."""

import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import api_statuses
import pytest
from api_server import ApiServer, Fault
from sample_objects import (
    IMAGE,
    MODEL,
    NO_GPUS,
    POD_SECURITY,
    PULLED,
    QUOTA,
    RUN,
    SOURCE_NOTE,
    TRANSFERRED,
    at,
    backoff_limit_exceeded,
    deadline_exceeded,
    done,
    epoch_line,
    failed,
    failed_by_policy,
    job_condition,
    preemption,
    running,
    stopped,
    waiting,
)
from simulated_cluster import Command, SimulatedCluster, wait_for, write_spec

from topwork.cli.output.follow import ConnectionOptions, ProgressReporter, follow
from topwork.clients.kubernetes.cluster import Cluster
from topwork.cluster.operations.follow import ConnectionStatus, RunFollower
from topwork.cluster.operations.run_watcher import FollowTimings
from topwork.cluster.status.run_status import RunStatus
from topwork.errors import SettingError, UnavailableError

pytestmark = pytest.mark.timeout(600)

POD = f"{RUN}-abcde"
STARTED = f"started on node gpu-1 (pod {POD})"
SUBMITTED = [
    SOURCE_NOTE,
    f"transferjob flowers submitted as job.batch/{RUN} in namespace team-a",
    f"following {RUN}; press Ctrl-C to leave it running",
]


@pytest.fixture
def simulated(api_server: ApiServer) -> SimulatedCluster:
    return SimulatedCluster(api_server)


@pytest.fixture
def submitted(kubeconfig: Path, tmp_path: Path) -> Iterator[Command]:
    """`topwork submit flowers.yaml --follow` in a separate process."""
    file = write_spec(tmp_path / "flowers.yaml")
    with Command("submit", str(file), "--image", IMAGE, "--follow", kubeconfig=kubeconfig) as command:
        yield command


def test_follow_reports_a_run_from_pending_to_its_model(submitted: Command, simulated: SimulatedCluster):
    simulated.put_pending_pod(NO_GPUS)
    submitted.expect("pending: no node has 2 free nvidia.com/gpu (insufficient on 3 of 5)")
    simulated.put_pod({"pull": running()})
    submitted.expect("pull started")
    simulated.put_pod(PULLED | {"transfer": running(100)})
    submitted.expect("transfer started")
    for epoch, accuracy in enumerate((0.81, 0.85, 0.83), 1):
        simulated.server.append_log(
            POD, "transfer", '{"message": "something else"}', epoch_line("transfer", epoch, 3, accuracy)
        )
        submitted.expect(f"transfer epoch {epoch}/3")
    simulated.server.end_log(POD, "transfer")
    simulated.put_pod(TRANSFERRED | {"fine-tune": running(200)})
    submitted.expect("fine-tune started")
    simulated.finish_run()

    assert submitted.wait() == 0
    # The Job was created just now, but its completion time is fixed.
    lines = [re.sub(r"succeeded in \w+", "succeeded in …", line) for line in submitted.lines]
    assert [line for line in lines if line != "pending"] == [
        *SUBMITTED,
        "pending: no node has 2 free nvidia.com/gpu (insufficient on 3 of 5); 2 of 5 nodes have the taint "
        "node-role.kubernetes.io/control-plane, which the job does not tolerate; wait until a node is free, or lower "
        "spec.compute.gpus",
        STARTED,
        "pull started",
        "pull done in 90s",
        "transfer started",
        "transfer epoch 1/3: validation_accuracy 0.8100",
        "transfer epoch 2/3: validation_accuracy 0.8500",
        "transfer epoch 3/3: validation_accuracy 0.8300 (best 0.8500)",
        "transfer done in 90s: validation_accuracy 0.9100",
        "fine-tune started",
        "fine-tune done in 90s: accuracy 0.9700",
        "succeeded in …: accuracy 0.9700",
        f"model {MODEL}",
    ]


def test_unmet_gate_exits_with_3(submitted: Command, simulated: SimulatedCluster):
    gate = failed("fine-tune", 3, "accuracy is 0.90, below 0.95 of spec.evaluate.gates", since=200)
    simulated.put_pod(TRANSFERRED | {"fine-tune": gate}, phase="Failed")
    simulated.patch_job_status(
        failed_by_policy("fine-tune", 3, "FailureTarget"), failed_by_policy("fine-tune", 3), failed=1
    )
    assert submitted.wait() == 3
    assert submitted.lines[-1] == "failed with exit code 3: accuracy is 0.90, below 0.95 of spec.evaluate.gates"


def test_wrong_spec_exits_with_2(submitted: Command, simulated: SimulatedCluster):
    simulated.put_pod(
        {"pull": failed("pull", 2, "s3://photos/flowers/ contains no image in a class directory.")}, phase="Failed"
    )
    simulated.patch_job_status(failed_by_policy("pull", 2), failed=1)
    assert submitted.wait() == 2
    assert submitted.lines[-1] == "failed with exit code 2: s3://photos/flowers/ contains no image in a class directory"


def test_retry_after_exit_code_75_is_reported_with_its_cause(submitted: Command, simulated: SimulatedCluster):
    simulated.put_pod({"pull": running()})
    submitted.expect("pull started")
    simulated.put_pod({"pull": failed("pull", 75, "s3.example.com does not answer")}, phase="Failed")
    simulated.patch_job_status(failed=1)
    submitted.expect("attempt 1 ended with exit code 75: s3.example.com does not answer")
    submitted.expect("pending: the next attempt starts after a back-off delay")
    simulated.put_pod({"pull": running(300)}, suffix="again", created=300)
    submitted.expect(f"attempt 2 after exit code 75: started on node gpu-1 (pod {RUN}-again)")
    simulated.finish_run(suffix="again", created=300)
    assert submitted.wait() == 0
    assert submitted.lines.count("attempt 1 ended with exit code 75: s3.example.com does not answer") == 1


def test_exceeded_backoff_limit_exits_with_the_last_exit_code(submitted: Command, simulated: SimulatedCluster):
    for index in range(4):
        simulated.put_pod(
            {"pull": failed("pull", 75, "no answer")}, phase="Failed", suffix=f"try{index}", created=index
        )
    simulated.patch_job_status(backoff_limit_exceeded(), failed=4)
    assert submitted.wait() == 75
    assert submitted.lines[-1] == "failed with exit code 75: no answer (attempt 4 of 4)"


def test_exceeded_deadline_exits_with_75(submitted: Command, simulated: SimulatedCluster):
    simulated.wait_for_job()
    simulated.patch_job_status(deadline_exceeded(), failed=1)
    assert submitted.wait() == 75
    assert submitted.lines[-1].startswith(
        "failed with exit code 75: the Job ran longer than spec.compute.deadlineSeconds"
    )


def test_preempted_run_resumes_in_a_new_pod(submitted: Command, simulated: SimulatedCluster):
    simulated.put_pod(PULLED | {"transfer": running(100)})
    submitted.expect("transfer started")
    simulated.server.append_log(POD, "transfer", epoch_line("transfer", 1, 3, 0.8))
    submitted.expect("transfer epoch 1/3")
    simulated.put_pod(PULLED | {"transfer": running(100)}, conditions=(preemption(),), deleted=120)
    submitted.expect("stopping: preempted by the scheduler in favor of a pod with higher priority. Its")
    simulated.server.end_log(POD, "transfer")
    simulated.put_pod(
        PULLED | {"transfer": stopped("transfer", 100)}, conditions=(preemption(),), deleted=120, phase="Failed"
    )
    submitted.expect("attempt 1 ended with exit code 143: preempted by the scheduler")
    simulated.server.remove("Pod", POD)
    simulated.put_pod(PULLED | {"transfer": running(300)}, suffix="again", created=200)
    submitted.expect(f"attempt 2 after exit code 143: started on node gpu-1 (pod {RUN}-again)")
    simulated.server.append_log(f"{RUN}-again", "transfer", epoch_line("transfer", 2, 3, 0.85))
    submitted.expect("transfer epoch 2/3: validation_accuracy 0.8500")
    simulated.server.end_log(f"{RUN}-again", "transfer")
    simulated.finish_run(suffix="again", created=200)
    assert submitted.wait() == 0


@pytest.mark.parametrize(
    ("message", "line"),
    [
        (QUOTA, "pending: exceeded quota gpus: requested requests.nvidia.com/gpu=2"),
        (POD_SECURITY, "pending: the pod violates the Pod Security level restricted:latest of the namespace"),
    ],
    ids=["quota", "Pod Security"],
)
def test_failed_pod_creation_is_reported_once(submitted: Command, simulated: SimulatedCluster, message: str, line: str):
    simulated.put_event(simulated.wait_for_job(), "FailedCreate", message)
    submitted.expect(line)
    simulated.put_event(simulated.wait_for_job(), "FailedCreate", message, seconds=60)
    simulated.put_pod({"pull": running()})
    submitted.expect("pull started")
    simulated.finish_run()
    assert submitted.wait() == 0
    assert sum(output_line.startswith(line) for output_line in submitted.lines) == 1


def test_failed_image_pull_is_reported_once_while_its_state_alternates(submitted: Command, simulated: SimulatedCluster):
    backing_off = waiting("ImagePullBackOff", f'Back-off pulling image "{IMAGE}"')
    missing = waiting("ErrImagePull", f"rpc error: code = NotFound desc = {IMAGE}: not found")
    for state in (missing, backing_off, missing, backing_off):
        simulated.put_pod({"pull": state})
    submitted.expect(f"pending: the image {IMAGE} can't be pulled. Is the name correct")
    simulated.put_pod({"pull": running()})
    submitted.expect("pull started")
    lines = [line for line in submitted.lines if line.startswith("pending: ")]
    assert len(lines) == len(set(lines)) <= 2


def test_deleted_job_exits_with_143(submitted: Command, simulated: SimulatedCluster):
    simulated.put_pod({"pull": running()})
    submitted.expect("pull started")
    simulated.server.remove("Job", RUN)
    assert submitted.wait() == 143
    assert submitted.lines[-1] == "failed with exit code 143: the Job was deleted"


def test_job_deleted_right_after_completion_exits_with_0(submitted: Command, simulated: SimulatedCluster):
    simulated.put_pod({"pull": running()})
    submitted.expect("pull started")
    simulated.finish_run()
    simulated.server.remove("Job", RUN)
    assert submitted.wait() == 0


def test_broken_watches_restart_without_repeated_lines(
    kubeconfig: Path, tmp_path: Path, simulated: SimulatedCluster, api_server: ApiServer
):
    for kind in ("jobs", "pods"):
        api_server.inject(Fault(cut_after_bytes=200, method="GET", path=f"/{kind}"), times=3)
    file = write_spec(tmp_path / "flowers.yaml")
    with Command("submit", str(file), "--image", IMAGE, "-f", kubeconfig=kubeconfig) as submitted:
        simulated.put_pod({"pull": running()})
        submitted.expect("pull started")
        api_server.compact()
        api_server.inject(Fault(api_statuses.too_many_requests(), headers={"Retry-After": "0"}), times=2)
        simulated.put_pod(PULLED | {"transfer": running(100)})
        submitted.expect("transfer started")
        simulated.finish_run()
        assert submitted.wait() == 0
        assert [line for line in submitted.lines if line != "pending"][len(SUBMITTED) : -1] == [
            STARTED,
            "pull started",
            "pull done in 90s",
            "transfer started",
            "transfer done in 90s: validation_accuracy 0.9100",
            "fine-tune started",
            "fine-tune done in 90s: accuracy 0.9700",
            submitted.lines[-2],
        ]


def test_ctrl_c_does_not_stop_the_run_and_prints_how_to_follow_again(submitted: Command, simulated: SimulatedCluster):
    simulated.put_pod({"pull": running()})
    submitted.expect("pull started")
    submitted.process.send_signal(signal.SIGINT)
    assert submitted.wait() == 130
    assert submitted.lines[-1] == f"The job continues. Follow it again with: topwork status {RUN} -n team-a --follow"
    assert simulated.server.get("Job", RUN)["metadata"].get("deletionTimestamp") is None


def test_status_follow_starts_in_the_middle_of_a_run(kubeconfig: Path, simulated: SimulatedCluster, tmp_path: Path):
    file = write_spec(tmp_path / "flowers.yaml")
    with Command("submit", str(file), "--image", IMAGE, kubeconfig=kubeconfig) as command:
        assert command.wait() == 0
    simulated.put_pod(PULLED | {"transfer": running(100)})
    simulated.server.append_log(POD, "transfer", *(epoch_line("transfer", epoch, 3, 0.8) for epoch in (1, 2)))
    with Command("status", "flowers", "--follow", kubeconfig=kubeconfig) as command:
        command.expect("transfer epoch 2/3")
        simulated.server.end_log(POD, "transfer")
        simulated.finish_run()
        assert command.wait() == 0
    assert command.lines[:6] == [
        STARTED,
        "pull started",
        "pull done in 90s",
        "transfer started",
        "transfer epoch 1/3: validation_accuracy 0.8000",
        "transfer epoch 2/3: validation_accuracy 0.8000",
    ]


def test_follow_of_a_job_that_is_gone_does_not_claim_that_it_continues(cluster: Cluster, simulated: SimulatedCluster):
    connection = ConnectionOptions("team-a")
    with pytest.raises(SettingError) as raised:
        follow(cluster, "flowers-00000000", connection, timings=TIMINGS)
    assert str(raised.value) == ("flowers-00000000 has no Job in namespace team-a: it does not exist or was deleted.")


# RunFollower with short intervals

TIMINGS = FollowTimings(
    list_seconds=0.1,
    watch_seconds=0.3,
    events_seconds=0.05,
    max_events_seconds=0.1,
    retry_seconds=0.05,
    outage_seconds=1.0,
)


@pytest.fixture
def job(cluster: Cluster, simulated: SimulatedCluster) -> None:
    """Apply the Job of the run."""
    from sample_objects import transfer_job

    from topwork.cluster.manifests.render import RenderOptions, render
    from topwork.cluster.operations.submit import Submission

    assert Submission(cluster, render(transfer_job(), RenderOptions(IMAGE)), print).submit() == "submitted"


def test_job_that_ends_before_its_pod_is_reported_has_the_error_of_the_pod(
    job: None, make_cluster: Callable[..., Cluster], simulated: SimulatedCluster
):
    class ClusterWithoutPodEvents(Cluster):
        """A cluster that reports no changes of pods."""

        def watch(self, kind, **selection):
            return iter(()) if kind == "Pod" else super().watch(kind, **selection)

    cluster = ClusterWithoutPodEvents(make_cluster()._client)
    statuses = RunFollower(cluster, RUN, timings=FollowTimings(list_seconds=60.0)).statuses()
    assert next(statuses).phase == "pending"
    simulated.put_pod({"pull": failed("pull", 2, "no such bucket")}, phase="Failed")
    simulated.patch_job_status(failed_by_policy("pull", 2), failed=1)
    last = list(statuses)[-1]
    assert (last.exit_code, last.error) == (2, "no such bucket")


def test_log_read_again_after_a_disconnect_repeats_no_epoch(
    job: None, make_cluster: Callable[..., Cluster], simulated: SimulatedCluster
):
    class ClusterWithLogFailure(Cluster):
        """A cluster in which reading a log fails once, after all retries of the client."""

        reads = 0

        def logs(self, *_, **options):
            ClusterWithLogFailure.reads += 1
            yield from (epoch_line("transfer", epoch, 3, 0.8) for epoch in (1, 2))
            if ClusterWithLogFailure.reads == 1:
                raise UnavailableError("the node does not answer")
            yield epoch_line("transfer", 3, 3, 0.9)

    statuses = RunFollower(ClusterWithLogFailure(make_cluster()._client), RUN, timings=TIMINGS).statuses()
    simulated.put_pod(PULLED | {"transfer": running(100)})
    epochs = []
    while len(epochs) < 3:
        state = next(statuses)
        if state.epoch and state.epoch.epoch not in epochs[-1:]:
            epochs.append(state.epoch.epoch)
    assert (epochs, ClusterWithLogFailure.reads) == ([1, 2, 3], 2)


def test_epochs_of_an_earlier_attempt_are_not_reported_for_the_next(
    job: None, cluster: Cluster, simulated: SimulatedCluster
):
    statuses = RunFollower(cluster, RUN, timings=TIMINGS).statuses()
    simulated.put_pod(PULLED | {"transfer": running(100)})
    simulated.server.append_log(POD, "transfer", epoch_line("transfer", 2, 3, 0.8))
    assert wait_for(lambda: next(statuses).epoch, "epoch").epoch == 2
    simulated.put_pod(PULLED | {"transfer": stopped("transfer", 100)}, phase="Failed")
    simulated.put_pod(PULLED | {"transfer": running(300)}, suffix="again", created=200)
    state = wait_for(
        lambda: (now := next(statuses)).running_container == (f"{RUN}-again", "transfer") and now, "second attempt"
    )
    assert state.epoch is None


def test_repeated_reason_is_reported_once():
    reporter = ProgressReporter()
    statuses = [
        RunStatus("flowers", RUN, "team-a", "pending", reason=reason) for reason in ("one", "other", "one", "other")
    ]
    lines = [line for state in statuses for line in reporter.lines(state)]
    assert lines == ["pending: one", "pending: other"]


def test_outage_of_the_api_server_is_reported_at_its_start_and_end(
    job: None, make_cluster: Callable[..., Cluster], api_server: ApiServer, simulated: SimulatedCluster
):
    statuses = RunFollower(make_cluster(attempts=1), RUN, timings=TIMINGS).statuses()
    assert next(statuses).phase == "pending"
    api_server.inject(Fault(api_statuses.service_unavailable()), times=12)
    connection_statuses = [
        status for status in (next(statuses), next(statuses)) if isinstance(status, ConnectionStatus)
    ]
    simulated.finish_run()
    *rest, last = statuses
    assert not any(isinstance(status, ConnectionStatus) for status in rest)
    assert (len(connection_statuses), bool(connection_statuses[0].error), connection_statuses[1]) == (
        2,
        True,
        ConnectionStatus(None),
    )
    assert last.phase == "succeeded"


def test_long_outage_of_the_api_server_raises_an_error(
    job: None, make_cluster: Callable[..., Cluster], api_server: ApiServer, simulated: SimulatedCluster
):
    statuses = RunFollower(make_cluster(attempts=1), RUN, timings=TIMINGS).statuses()
    next(statuses)
    api_server.inject(Fault(api_statuses.service_unavailable()), times=10_000)
    with pytest.raises(UnavailableError):
        list(statuses)


def test_rejected_credentials_raise_an_error(job: None, make_cluster: Callable[..., Cluster], api_server: ApiServer):
    statuses = RunFollower(make_cluster(), RUN, timings=TIMINGS).statuses()
    next(statuses)
    api_server.inject(Fault(api_statuses.unauthorized()), times=10_000)
    with pytest.raises(SettingError):
        list(statuses)


def test_unknown_run_cannot_be_followed(cluster: Cluster):
    with pytest.raises(SettingError) as raised:
        list(RunFollower(cluster, "nothing-00000000", timings=TIMINGS).statuses())
    assert str(raised.value) == ("nothing-00000000 has no Job in namespace team-a: it does not exist or was deleted.")


def test_new_job_with_the_same_name_is_another_submission(
    job: None, cluster: Cluster, api_server: ApiServer, simulated: SimulatedCluster
):
    statuses = RunFollower(cluster, RUN, timings=TIMINGS).statuses()
    next(statuses)
    new_job = dict(simulated.wait_for_job())
    api_server.remove("Job", RUN)
    new_job["metadata"] = {key: value for key, value in new_job["metadata"].items() if key != "uid"}
    api_server.put(new_job)
    last = list(statuses)[-1]
    assert isinstance(last, RunStatus)
    assert (last.exit_code, last.error) == (143, "the Job was deleted")


def test_follow_works_without_permission_to_read_events(
    job: None, make_cluster: Callable[..., Cluster], api_server: ApiServer, simulated: SimulatedCluster
):
    api_server.inject(Fault(api_statuses.rbac_denied("list", "events", "team-a"), path="/events"), times=10_000)
    statuses = RunFollower(make_cluster(), RUN, timings=TIMINGS).statuses()
    assert next(statuses).phase == "pending"
    simulated.finish_run()
    assert list(statuses)[-1].phase == "succeeded"


def test_prefetch_job_is_followed_until_it_ends(
    make_cluster: Callable[..., Cluster], api_server: ApiServer, simulated: SimulatedCluster
):
    from sample_objects import job as sample_job

    api_server.put(sample_job(role="prefetch"))
    statuses = RunFollower(make_cluster(), RUN, "prefetch", TIMINGS).statuses()
    assert next(statuses).phase == "pending"
    simulated.put_pod({"pull": running()}, job=f"{RUN}-pull")
    assert wait_for(lambda: next(statuses).phase == "running", "run")
    simulated.put_pod({"pull": done("pull")}, job=f"{RUN}-pull", phase="Succeeded")
    simulated.patch_job_status(
        job_condition("Complete", "CompletionsReached", "Reached"), job=f"{RUN}-pull", completionTime=at(90)
    )
    assert [(state.phase, state.exit_code) for state in statuses][-1] == ("succeeded", 0)
