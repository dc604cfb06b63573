"""How runs are shown: `topwork status` and `topwork list` over a server that behaves like the API."""

import copy
import json
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import api_statuses
import pytest
import states
from api_server import ApiServer, Fault
from played import Command, Played
from states import MODEL, NO_GPUS, PULLED, QUOTA, RUN, epoch_line, failed, running

from topwork.cli.output.run_status import duration

pytestmark = pytest.mark.timeout(600)
POD = f"{RUN}-abcde"
# Three hours and a few seconds: for most of a minute, that is shown as 3h.
HOURS = 3 * 3600 + 5
NEXT = [
    "",
    f"logs    topwork logs {RUN} -n team-a -f",
    f"follow  topwork status {RUN} -n team-a --follow",
    f"stop    topwork cancel {RUN} -n team-a",
]


@pytest.fixture
def played(api_server: ApiServer) -> Played:
    """The Job of the run, three hours old."""
    put(api_server, states.job())
    return Played(api_server)


def put(
    server: ApiServer, manifest: dict[str, Any], seconds: float = HOURS, namespace: str = "team-a"
) -> dict[str, Any]:
    """Keep an object that is that old."""
    manifest = copy.deepcopy(manifest)
    then = datetime.now(UTC) - timedelta(seconds=seconds)
    manifest["metadata"] |= {"creationTimestamp": then.strftime("%Y-%m-%dT%H:%M:%SZ"), "namespace": namespace}
    return server.put(manifest)


def since(seconds: float) -> str:
    return (datetime.now(UTC) - timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%SZ")


def test_a_running_stage_shows_its_epochs_and_its_best_metric(topwork, played):
    transfer = {"running": {"startedAt": since(3605)}}
    played.pod(PULLED | {"transfer": transfer})
    accuracies = enumerate((0.81, 0.93, 0.92), 1)
    lines = [epoch_line("transfer", epoch, 20, accuracy) for epoch, accuracy in accuracies]
    played.server.log(POD, "transfer", "Some library says something.", *lines)
    assert topwork("status", "flowers") == (
        0,
        [
            f"{RUN} in namespace team-a: running, transfer",
            "  job       flowers",
            "  age       3h",
            "  node      gpu-1",
            "  epoch     3/20",
            "  best      validation_accuracy 0.9300",
            "",
            "STAGE       STATE     DURATION   EPOCHS   BEST",
            "pull        done      90s",
            "transfer    running   60m        3/20     validation_accuracy 0.9300",
            "fine-tune   waiting",
            *NEXT,
        ],
    )


def test_a_finished_run_shows_its_model_and_how_to_see_it(topwork, played):
    played.finish()
    code, lines = topwork("status", RUN)
    assert code == 0
    assert lines[0] == f"{RUN} in namespace team-a: succeeded"
    assert f"  model     {MODEL}" in lines
    assert "transfer    done    90s        5        validation_accuracy 0.9100" in lines
    assert "fine-tune   done    90s        10       accuracy 0.9700" in lines
    assert lines[-1] == f"see  topwork models show {MODEL.rstrip('/')}"


def test_a_failed_run_shows_exit_code_and_error_and_status_still_ends_with_0(topwork, played):
    played.pod({"pull": failed("pull", 2, "s3://photos/flowers/ holds no image.")}, phase="Failed")
    played.status(states.by_policy("pull", 2), failed=1)
    code, lines = topwork("status", "flowers")
    assert code == 0
    assert lines[0] == f"{RUN} in namespace team-a: failed with exit code 2"
    assert "  error     s3://photos/flowers/ holds no image" in lines
    assert lines[-1] == f"logs    topwork logs {RUN} -n team-a"


def test_earlier_attempts_are_shown_with_their_ends(topwork, played):
    played.pod({"pull": failed("pull", 75, "no answer")}, phase="Failed", suffix="first")
    played.pod({"pull": running()}, suffix="second", created=100)
    played.status(failed=1)
    _, lines = topwork("status", "flowers")
    assert "  attempts  2, 1 of them counted (retries: 3)" in lines
    assert f"before: {RUN}-first failed with exit code 75: no answer" in lines


@pytest.mark.parametrize("reason", ["no node", "quota"])
def test_a_run_that_waits_says_why(topwork, played, reason):
    if reason == "no node":
        played.pending(NO_GPUS)
        told = "no node has 2 free nvidia.com/gpu (3 of 5 lack it)"
    else:
        played.event(played.job(), "FailedCreate", QUOTA)
        told = "the quota gpus leaves no room"
    _, lines = topwork("status", "flowers")
    assert lines[0] == f"{RUN} in namespace team-a: pending"
    (line,) = [line for line in lines if line.startswith("  reason ")]
    assert line.startswith(f"  reason    {told}")
    _, (header, row) = topwork("list")
    assert header.split() == ["NAME", "RUN", "STAGE", "EPOCH", "BEST", "AGE", "STATUS"]
    assert f"pending: {told}" in row


def test_status_takes_the_newest_run_of_a_job_and_tells_of_the_others(topwork, played):
    older = states.job(retries=1)
    older["metadata"] |= {"name": "flowers-00000000", "uid": "older"}
    older["metadata"]["labels"]["topwork.dev/run"] = "flowers-00000000"
    put(played.server, older, 2 * HOURS)
    _, lines = topwork("status", "flowers")
    assert lines[0] == f"{RUN} in namespace team-a: pending"
    assert lines[1] == "  job       flowers, the newest of 2 runs (topwork list)"
    _, lines = topwork("status", "flowers-00000000")
    assert lines[0] == "flowers-00000000 in namespace team-a: pending"
    assert [line.split()[1] for line in topwork("list")[1][1:]] == [RUN, "flowers-00000000"]


@pytest.mark.parametrize("name", [f"job.batch/{RUN}", f"job/{RUN}", f"{RUN}-pull", "transferjob/flowers"])
def test_a_run_is_found_by_the_names_that_kubectl_and_submit_print(topwork, played, name):
    assert topwork("status", name)[1][0] == f"{RUN} in namespace team-a: pending"


@pytest.mark.parametrize("name", ["nothing", "no/thing", "-", "a" * 70])
def test_a_name_that_means_nothing_is_answered_with_those_that_there_are(topwork, played, name):
    assert topwork("status", "--", name) == (
        2,
        [f"topwork: no job or run {name} in namespace team-a. There are: {RUN}."],
    )


def test_an_empty_namespace_says_how_to_begin(topwork, api_server):
    assert topwork("list") == (0, ["No runs found in namespace team-a."])
    assert topwork("list", "-A") == (0, ["No runs found in any namespace."])
    assert topwork("list", "--json") == (0, ["[]"])
    assert topwork("status", "flowers") == (
        2,
        ["topwork: no job or run flowers in namespace team-a. There is none at all: topwork submit FILE starts one."],
    )


def test_follow_needs_a_name(topwork, api_server):
    told = ["topwork: --follow needs the name of a job or a run, and does not go with --json."]
    assert topwork("status", "--follow") == (2, told)
    assert topwork("status", "flowers", "--follow", "--json") == (2, told)


def test_json_of_a_run_holds_everything_under_stable_keys(topwork, played):
    played.finish()
    code, lines = topwork("status", "flowers", "--json")
    told = json.loads("\n".join(lines))
    assert code == 0
    assert told.pop("created")[:4] == str(datetime.now(UTC).year)
    assert told == {
        "job": "flowers",
        "run": RUN,
        "namespace": "team-a",
        "phase": "succeeded",
        "stage": "fine-tune",
        "epoch": None,
        "epochs": None,
        "metric": "accuracy",
        "value": 0.97,
        "model": MODEL,
        "exitCode": 0,
        "reason": None,
        "error": None,
        "ended": "2026-03-01T12:10:00Z",
        "node": "gpu-1",
        "queue": None,
        "failures": 0,
        "retries": 3,
        "attempts": [
            {
                "pod": POD,
                "node": "gpu-1",
                "created": "2026-03-01T12:00:01Z",
                "state": "done",
                "exitCode": 0,
                "error": None,
                "counted": False,
                "stages": [
                    stage("pull", "12:00:10", "12:01:40", None, None, None),
                    stage("transfer", "12:01:40", "12:03:10", 5, "validation_accuracy", 0.91),
                    stage("fine-tune", "12:03:20", "12:04:50", 10, "accuracy", 0.97),
                ],
            }
        ],
    }


def stage(name: str, started: str, ended: str, epochs: Any, metric: Any, value: Any) -> dict[str, Any]:
    return {
        "stage": name,
        "state": "done",
        "started": f"2026-03-01T{started}Z",
        "ended": f"2026-03-01T{ended}Z",
        "exitCode": 0,
        "epochs": epochs,
        "metric": metric,
        "value": value,
        "error": None,
    }


def test_list_of_all_namespaces_names_each(topwork, played):
    played.pod(PULLED | {"transfer": running()})
    played.server.log(POD, "transfer", epoch_line("transfer", 2, 5, 0.9))
    other = states.job()
    other["metadata"]["uid"] = "other"
    put(played.server, other, 10, namespace="default")
    code, lines = topwork("list", "-A")
    assert code == 0
    assert [line.split()[:3] for line in lines[1:]] == [
        ["default", "flowers", RUN],
        ["team-a", "flowers", RUN],
    ]
    assert "2/5" in lines[2]
    assert [line.split()[0] for line in topwork("list")[1][1:]] == ["flowers"]


def test_status_without_a_name_is_the_list(topwork, played):
    assert topwork("status") == topwork("list")


def test_a_list_of_two_hundred_runs_takes_three_lists_and_some_dozens_of_logs(topwork, api_server):
    for index in range(200):
        job = states.job()
        name = f"flowers-{index:08x}"
        job["metadata"] |= {"name": name, "uid": f"job-{index}"}
        job["metadata"]["labels"]["topwork.dev/run"] = name
        put(api_server, job, index)
        pod = states.pod(PULLED | {"transfer": running()}, of=job)
        pod["metadata"]["labels"]["topwork.dev/run"] = name
        api_server.put(pod)
        api_server.log(pod["metadata"]["name"], "transfer", epoch_line("transfer", 1, 5, 0.9))
    api_server.requests.clear()
    began = time.monotonic()
    code, lines = topwork("list")
    assert (code, len(lines), time.monotonic() - began < 30) == (0, 201, True)
    logs = [request for request in api_server.requests if request.path.endswith("/log")]
    assert (len(logs), len(api_server.requests) - len(logs)) == (48, 3)
    assert [line.split()[1] for line in lines[1:3]] == ["flowers-00000000", "flowers-00000001"]
    assert sum("1/5" in line for line in lines) == 48


def test_logs_and_events_that_must_not_be_read_leave_their_columns_empty(topwork, played, api_server):
    played.pod(PULLED | {"transfer": running()})
    api_server.plant(Fault(api_statuses.rbac("get", "pods/log", "team-a"), path="/log"), times=10)
    api_server.plant(Fault(api_statuses.rbac("list", "events", "team-a"), path="/events"), times=10)
    code, lines = topwork("list")
    assert code == 0
    assert lines[1].split()[:3] == ["flowers", RUN, "transfer"]
    assert lines[1].endswith("running")


def test_a_run_that_pulls_ahead_says_so(topwork, api_server):
    job = put(api_server, states.job(role="prefetch"))
    api_server.put(states.pod({"pull": running()}, of=job))
    _, lines = topwork("status", "flowers")
    assert lines[0] == f"{RUN} in namespace team-a: pulling ahead"


def test_status_and_list_as_processes_of_their_own(kubeconfig, played):
    played.finish()
    for words in (("status", "flowers"), ("list",)):
        with Command(*words, kubeconfig=kubeconfig) as command:
            assert command.end() == 0
        assert RUN in command.text
        assert "accuracy 0.9700" in command.text


@pytest.mark.parametrize(
    ("seconds", "written"),
    [(0, "0s"), (-5, "0s"), (59, "59s"), (119, "119s"), (120, "2m"), (310, "5m10s"), (660, "11m"), (3600, "60m"),
     (7260, "121m"), (10800, "3h"), (14460, "4h1m"), (36000, "10h"), (90000, "25h"), (180000, "2d2h"), (864000, "10d")],
)  # fmt: skip
def test_spans_of_time_are_written_as_kubectl_does(seconds, written):
    assert duration(seconds) == written
