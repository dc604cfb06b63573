"""Following runs of a played cluster to their end, by the commands themselves."""

import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import api_statuses
import pytest
from api_server import ApiServer, Fault
from played import Command, Played, eventually, spec_file
from states import (
    IMAGE,
    MODEL,
    NO_GPUS,
    POD_SECURITY,
    PULLED,
    QUOTA,
    RUN,
    TRANSFERRED,
    at,
    backoff_limit_exceeded,
    by_policy,
    deadline_exceeded,
    done,
    epoch_line,
    failed,
    job_condition,
    preemption,
    running,
    stopped,
    waiting,
)

from topwork.cli.output.follow import Narration
from topwork.clients.kubernetes.cluster import Cluster
from topwork.cluster.operations.follow import Following, Trouble
from topwork.cluster.operations.run_events import Pace
from topwork.cluster.status.run_state import RunState
from topwork.errors import SettingError, UnavailableError

pytestmark = pytest.mark.timeout(600)

POD = f"{RUN}-abcde"
STARTED = f"started on node gpu-1 (pod {POD})"
SUBMITTED = [
    f"transferjob flowers submitted as job.batch/{RUN} in namespace team-a",
    f"following {RUN}; Ctrl-C leaves it running",
]


@pytest.fixture
def played(api_server: ApiServer) -> Played:
    return Played(api_server)


@pytest.fixture
def submitted(kubeconfig: Path, tmp_path: Path) -> Iterator[Command]:
    """`topwork submit flowers.yaml --follow`, in a process of its own."""
    file = spec_file(tmp_path / "flowers.yaml")
    with Command("submit", str(file), "--image", IMAGE, "--follow", kubeconfig=kubeconfig) as command:
        yield command


def test_a_run_is_followed_from_no_node_to_its_model(submitted: Command, played: Played):
    played.pending(NO_GPUS)
    submitted.expect("pending: no node has 2 free nvidia.com/gpu (3 of 5 lack it)")
    played.pod({"pull": running()})
    submitted.expect("pull started")
    played.pod(PULLED | {"transfer": running(100)})
    submitted.expect("transfer started")
    for epoch, accuracy in enumerate((0.81, 0.85, 0.83), 1):
        played.server.log(POD, "transfer", '{"message": "something else"}', epoch_line("transfer", epoch, 3, accuracy))
        submitted.expect(f"transfer epoch {epoch}/3")
    played.server.end_log(POD, "transfer")
    played.pod(TRANSFERRED | {"fine-tune": running(200)})
    submitted.expect("fine-tune started")
    played.finish()

    assert submitted.end() == 0
    # The Job was created just now, its end is of another day.
    lines = [re.sub(r"succeeded in \w+", "succeeded in …", line) for line in submitted.lines]
    assert [line for line in lines if line != "pending"] == [
        *SUBMITTED,
        "pending: no node has 2 free nvidia.com/gpu (3 of 5 lack it); 2 of 5 have the taint "
        "node-role.kubernetes.io/control-plane, which the job does not tolerate; wait until one is free, or lower "
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


def test_a_gate_that_is_not_met_ends_with_3(submitted: Command, played: Played):
    gate = failed("fine-tune", 3, "accuracy is 0.90, below 0.95 of spec.evaluate.gates", since=200)
    played.pod(TRANSFERRED | {"fine-tune": gate}, phase="Failed")
    played.status(by_policy("fine-tune", 3, "FailureTarget"), by_policy("fine-tune", 3), failed=1)
    assert submitted.end() == 3
    assert submitted.lines[-1] == "failed with exit code 3: accuracy is 0.90, below 0.95 of spec.evaluate.gates"


def test_a_wrong_spec_ends_with_2(submitted: Command, played: Played):
    played.pod({"pull": failed("pull", 2, "s3://photos/flowers/ holds no image.")}, phase="Failed")
    played.status(by_policy("pull", 2), failed=1)
    assert submitted.end() == 2
    assert submitted.lines[-1] == "failed with exit code 2: s3://photos/flowers/ holds no image"


def test_an_attempt_after_exit_75_is_announced_with_the_cause(submitted: Command, played: Played):
    played.pod({"pull": running()})
    submitted.expect("pull started")
    played.pod({"pull": failed("pull", 75, "s3.example.com does not answer")}, phase="Failed")
    played.status(failed=1)
    submitted.expect("attempt 1 ended with exit code 75: s3.example.com does not answer")
    submitted.expect("pending: the next attempt follows after a pause")
    played.pod({"pull": running(300)}, suffix="again", created=300)
    submitted.expect(f"attempt 2 after exit 75: started on node gpu-1 (pod {RUN}-again)")
    played.finish(suffix="again", created=300)
    assert submitted.end() == 0
    assert submitted.lines.count("attempt 1 ended with exit code 75: s3.example.com does not answer") == 1


def test_retries_that_are_used_up_end_with_the_last_exit_code(submitted: Command, played: Played):
    for index in range(4):
        played.pod({"pull": failed("pull", 75, "no answer")}, phase="Failed", suffix=f"try{index}", created=index)
    played.status(backoff_limit_exceeded(), failed=4)
    assert submitted.end() == 75
    assert submitted.lines[-1] == "failed with exit code 75: no answer (attempt 4 of 4)"


def test_a_deadline_that_is_over_ends_with_75(submitted: Command, played: Played):
    played.job()
    played.status(deadline_exceeded(), failed=1)
    assert submitted.end() == 75
    assert submitted.lines[-1].startswith("failed with exit code 75: it ran longer than spec.compute.deadlineSeconds")


def test_a_preempted_run_goes_on_in_a_new_pod(submitted: Command, played: Played):
    played.pod(PULLED | {"transfer": running(100)})
    submitted.expect("transfer started")
    played.server.log(POD, "transfer", epoch_line("transfer", 1, 3, 0.8))
    submitted.expect("transfer epoch 1/3")
    played.pod(PULLED | {"transfer": running(100)}, conditions=(preemption(),), deleted=120)
    submitted.expect("stopping: preempted: the scheduler made room for a pod of higher priority. Its")
    played.server.end_log(POD, "transfer")
    played.pod(PULLED | {"transfer": stopped("transfer", 100)}, conditions=(preemption(),), deleted=120, phase="Failed")
    submitted.expect("attempt 1 ended with exit code 143: preempted: the scheduler made room")
    played.server.remove("Pod", POD)
    played.pod(PULLED | {"transfer": running(300)}, suffix="again", created=200)
    submitted.expect(f"attempt 2 after exit 143: started on node gpu-1 (pod {RUN}-again)")
    played.server.log(f"{RUN}-again", "transfer", epoch_line("transfer", 2, 3, 0.85))
    submitted.expect("transfer epoch 2/3: validation_accuracy 0.8500")
    played.server.end_log(f"{RUN}-again", "transfer")
    played.finish(suffix="again", created=200)
    assert submitted.end() == 0


@pytest.mark.parametrize(
    ("message", "line"),
    [
        (QUOTA, "pending: the quota gpus leaves no room: asked for requests.nvidia.com/gpu=2"),
        (POD_SECURITY, "pending: the namespace's Pod Security level restricted:latest refuses the pod"),
    ],
    ids=["quota", "Pod Security"],
)
def test_a_pod_that_may_not_be_created_says_why_once_and_starts_later(
    submitted: Command, played: Played, message: str, line: str
):
    played.event(played.job(), "FailedCreate", message)
    submitted.expect(line)
    played.event(played.job(), "FailedCreate", message, seconds=60)
    played.pod({"pull": running()})
    submitted.expect("pull started")
    played.finish()
    assert submitted.end() == 0
    assert len([told for told in submitted.lines if told.startswith(line)]) == 1


def test_an_image_that_can_not_be_pulled_is_named_once_however_its_state_alternates(submitted: Command, played: Played):
    backing_off = waiting("ImagePullBackOff", f'Back-off pulling image "{IMAGE}"')
    missing = waiting("ErrImagePull", f"rpc error: code = NotFound desc = {IMAGE}: not found")
    for state in (missing, backing_off, missing, backing_off):
        played.pod({"pull": state})
    submitted.expect(f"pending: the image {IMAGE} can't be pulled. Is the name right")
    played.pod({"pull": running()})
    submitted.expect("pull started")
    told = [line for line in submitted.lines if line.startswith("pending: ")]
    assert len(told) == len(set(told)) <= 2


def test_a_job_that_is_deleted_ends_with_143(submitted: Command, played: Played):
    played.pod({"pull": running()})
    submitted.expect("pull started")
    played.server.remove("Job", RUN)
    assert submitted.end() == 143
    assert submitted.lines[-1] == "failed with exit code 143: its Job was deleted"


def test_a_job_that_is_removed_as_soon_as_it_is_done_was_done(submitted: Command, played: Played):
    played.pod({"pull": running()})
    submitted.expect("pull started")
    played.finish()
    played.server.remove("Job", RUN)
    assert submitted.end() == 0


def test_watches_that_break_off_are_taken_up_and_nothing_is_told_twice(
    kubeconfig: Path, tmp_path: Path, played: Played, api_server: ApiServer
):
    for kind in ("jobs", "pods"):
        api_server.plant(Fault(cut_after=200, method="GET", path=f"/{kind}"), times=3)
    file = spec_file(tmp_path / "flowers.yaml")
    with Command("submit", str(file), "--image", IMAGE, "-f", kubeconfig=kubeconfig) as submitted:
        played.pod({"pull": running()})
        submitted.expect("pull started")
        api_server.compact()
        api_server.plant(Fault(api_statuses.too_many(), headers={"Retry-After": "0"}), times=2)
        played.pod(PULLED | {"transfer": running(100)})
        submitted.expect("transfer started")
        played.finish()
        assert submitted.end() == 0
        assert [line for line in submitted.lines if line != "pending"][2:-1] == [
            STARTED,
            "pull started",
            "pull done in 90s",
            "transfer started",
            "transfer done in 90s: validation_accuracy 0.9100",
            "fine-tune started",
            "fine-tune done in 90s: accuracy 0.9700",
            submitted.lines[-2],
        ]


def test_ctrl_c_leaves_the_run_alone_and_says_how_to_come_back(submitted: Command, played: Played):
    played.pod({"pull": running()})
    submitted.expect("pull started")
    submitted.process.send_signal(signal.SIGINT)
    assert submitted.end() == 130
    assert submitted.lines[-1] == f"The job goes on. Come back with: topwork status {RUN} -n team-a --follow"
    assert played.server.get("Job", RUN)["metadata"].get("deletionTimestamp") is None


def test_status_follows_a_run_that_is_under_way(kubeconfig: Path, played: Played, tmp_path: Path):
    file = spec_file(tmp_path / "flowers.yaml")
    with Command("submit", str(file), "--image", IMAGE, kubeconfig=kubeconfig) as command:
        assert command.end() == 0
    played.pod(PULLED | {"transfer": running(100)})
    played.server.log(POD, "transfer", *(epoch_line("transfer", epoch, 3, 0.8) for epoch in (1, 2)))
    with Command("status", "flowers", "--follow", kubeconfig=kubeconfig) as command:
        command.expect("transfer epoch 2/3")
        played.server.end_log(POD, "transfer")
        played.finish()
        assert command.end() == 0
    assert command.lines[:6] == [
        STARTED,
        "pull started",
        "pull done in 90s",
        "transfer started",
        "transfer epoch 1/3: validation_accuracy 0.8000",
        "transfer epoch 2/3: validation_accuracy 0.8000",
    ]


# The states themselves, at a quicker pace.

PACE = Pace(
    survey_seconds=0.1,
    watch_seconds=0.3,
    events_seconds=0.05,
    events_most_seconds=0.1,
    retry_seconds=0.05,
    patience_seconds=1.0,
)


@pytest.fixture
def job(cluster: Cluster, played: Played) -> None:
    """The Job of the run, applied."""
    from states import transfer_job

    from topwork.cluster.manifests.render import Placement, render
    from topwork.cluster.operations.submit import Submission

    assert Submission(cluster, render(transfer_job(), Placement(IMAGE)), print).submit() == "submitted"


def test_the_end_of_a_job_that_is_told_before_that_of_its_pod_still_has_its_error(
    job: None, make_cluster: Callable[..., Cluster], played: Played
):
    class Deaf(Cluster):
        """A cluster whose pods change without a word."""

        def watch(self, kind, **selection):
            return iter(()) if kind == "Pod" else super().watch(kind, **selection)

    deaf = Deaf(make_cluster()._api)
    states = Following(deaf, RUN, pace=Pace(survey_seconds=60.0)).states()
    assert next(states).phase == "pending"
    played.pod({"pull": failed("pull", 2, "no such bucket")}, phase="Failed")
    played.status(by_policy("pull", 2), failed=1)
    last = list(states)[-1]
    assert (last.exit_code, last.error) == (2, "no such bucket")


def test_a_log_that_is_read_again_after_a_break_tells_no_epoch_twice(
    job: None, make_cluster: Callable[..., Cluster], played: Played
):
    class Broken(Cluster):
        """A cluster whose node loses the log once, beyond what the edge can mend."""

        reads = 0

        def logs(self, *_, **options):
            Broken.reads += 1
            yield from (epoch_line("transfer", epoch, 3, 0.8) for epoch in (1, 2))
            if Broken.reads == 1:
                raise UnavailableError("the node does not answer")
            yield epoch_line("transfer", 3, 3, 0.9)

    states = Following(Broken(make_cluster()._api), RUN, pace=PACE).states()
    played.pod(PULLED | {"transfer": running(100)})
    epochs = []
    while len(epochs) < 3:
        state = next(states)
        if state.epoch and state.epoch.epoch not in epochs[-1:]:
            epochs.append(state.epoch.epoch)
    assert (epochs, Broken.reads) == ([1, 2, 3], 2)


def test_the_epochs_of_an_earlier_attempt_are_not_those_of_the_next(job: None, cluster: Cluster, played: Played):
    states = Following(cluster, RUN, pace=PACE).states()
    played.pod(PULLED | {"transfer": running(100)})
    played.server.log(POD, "transfer", epoch_line("transfer", 2, 3, 0.8))
    assert eventually(lambda: next(states).epoch, "epoch").epoch == 2
    played.pod(PULLED | {"transfer": stopped("transfer", 100)}, phase="Failed")
    played.pod(PULLED | {"transfer": running(300)}, suffix="again", created=200)
    state = eventually(lambda: (now := next(states)).running == (f"{RUN}-again", "transfer") and now, "second attempt")
    assert state.epoch is None


def test_what_was_told_is_not_told_again_when_it_comes_back():
    narration = Narration()
    states = [
        RunState("flowers", RUN, "team-a", "pending", reason=reason) for reason in ("one", "other", "one", "other")
    ]
    told = [line for state in states for line in narration.lines(state)]
    assert told == ["pending: one", "pending: other"]


def test_a_server_that_is_away_for_a_while_is_told_of_once_and_once_when_it_is_back(
    job: None, make_cluster: Callable[..., Cluster], api_server: ApiServer, played: Played
):
    states = Following(make_cluster(attempts=1), RUN, pace=PACE).states()
    assert next(states).phase == "pending"
    api_server.plant(Fault(api_statuses.unavailable()), times=12)
    troubles = [each for each in (next(states), next(states)) if isinstance(each, Trouble)]
    played.finish()
    *rest, last = states
    assert not any(isinstance(each, Trouble) for each in rest)
    assert (len(troubles), bool(troubles[0].message), troubles[1]) == (2, True, Trouble(None))
    assert last.phase == "succeeded"


def test_a_server_that_stays_away_is_given_up(
    job: None, make_cluster: Callable[..., Cluster], api_server: ApiServer, played: Played
):
    states = Following(make_cluster(attempts=1), RUN, pace=PACE).states()
    next(states)
    api_server.plant(Fault(api_statuses.unavailable()), times=10_000)
    with pytest.raises(UnavailableError):
        list(states)


def test_an_account_that_may_no_longer_look_is_told_so(
    job: None, make_cluster: Callable[..., Cluster], api_server: ApiServer
):
    states = Following(make_cluster(), RUN, pace=PACE).states()
    next(states)
    api_server.plant(Fault(api_statuses.unauthorized()), times=10_000)
    with pytest.raises(SettingError):
        list(states)


def test_a_run_that_is_not_there_can_not_be_followed(cluster: Cluster):
    with pytest.raises(SettingError) as raised:
        list(Following(cluster, "nothing-00000000", pace=PACE).states())
    assert str(raised.value) == "there is no Job of nothing-00000000 in namespace team-a any more."


def test_a_job_of_the_same_name_is_another_submission(
    job: None, cluster: Cluster, api_server: ApiServer, played: Played
):
    states = Following(cluster, RUN, pace=PACE).states()
    next(states)
    again = dict(played.job())
    api_server.remove("Job", RUN)
    again["metadata"] = {key: value for key, value in again["metadata"].items() if key != "uid"}
    api_server.put(again)
    last = list(states)[-1]
    assert isinstance(last, RunState)
    assert (last.exit_code, last.error) == (143, "its Job was deleted")


def test_events_that_must_not_be_read_are_no_end(
    job: None, make_cluster: Callable[..., Cluster], api_server: ApiServer, played: Played
):
    api_server.plant(Fault(api_statuses.rbac("list", "events", "team-a"), path="/events"), times=10_000)
    states = Following(make_cluster(), RUN, pace=PACE).states()
    assert next(states).phase == "pending"
    played.finish()
    assert list(states)[-1].phase == "succeeded"


def test_the_job_that_pulls_ahead_is_followed_to_its_own_end(
    make_cluster: Callable[..., Cluster], api_server: ApiServer, played: Played
):
    from states import job as made

    api_server.put(made(role="prefetch"))
    states = Following(make_cluster(), RUN, "prefetch", PACE).states()
    assert next(states).phase == "pending"
    played.pod({"pull": running()}, job=f"{RUN}-pull")
    assert eventually(lambda: next(states).phase == "running", "run")
    played.pod({"pull": done("pull")}, job=f"{RUN}-pull", phase="Succeeded")
    played.status(job_condition("Complete", "CompletionsReached", "Reached"), job=f"{RUN}-pull", completionTime=at(90))
    assert [(state.phase, state.exit_code) for state in states][-1] == ("succeeded", 0)
