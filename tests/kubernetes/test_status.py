"""`topwork status` and `topwork list` with a simulated cluster."""

import copy
import json
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import api_statuses
import pytest
import sample_objects
from api_server import ApiServer, Fault
from sample_objects import MODEL, NO_GPUS, PULLED, QUOTA, RUN, epoch_line, failed, running
from simulated_cluster import Command, SimulatedCluster

from topwork.cluster.status.durations import format_duration

pytestmark = pytest.mark.timeout(600)
POD = f"{RUN}-abcde"
# A few seconds more than three hours, so that the age stays 3h during a test.
THREE_HOURS = 3 * 3600 + 5
NEXT_COMMANDS = [
    "",
    f"logs    topwork logs {RUN} -n team-a -f",
    f"follow  topwork status {RUN} -n team-a --follow",
    f"stop    topwork cancel {RUN} -n team-a",
]


@pytest.fixture
def simulated(api_server: ApiServer) -> SimulatedCluster:
    """The Job of the run, three hours old."""
    put(api_server, sample_objects.job())
    return SimulatedCluster(api_server)


def put(
    server: ApiServer, obj: dict[str, Any], seconds: float = THREE_HOURS, namespace: str = "team-a"
) -> dict[str, Any]:
    """Store an object that was created this many seconds ago."""
    obj = copy.deepcopy(obj)
    created = datetime.now(UTC) - timedelta(seconds=seconds)
    obj["metadata"] |= {"creationTimestamp": created.strftime("%Y-%m-%dT%H:%M:%SZ"), "namespace": namespace}
    return server.put(obj)


def seconds_ago(seconds: float) -> str:
    return (datetime.now(UTC) - timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%SZ")


def test_status_shows_epochs_and_best_metric_of_a_running_stage(topwork, simulated):
    transfer = {"running": {"startedAt": seconds_ago(3605)}}
    simulated.put_pod(PULLED | {"transfer": transfer})
    accuracies = enumerate((0.81, 0.93, 0.92), 1)
    lines = [epoch_line("transfer", epoch, 20, accuracy) for epoch, accuracy in accuracies]
    simulated.server.append_log(POD, "transfer", "Some library says something.", *lines)
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
            *NEXT_COMMANDS,
        ],
    )


def test_status_shows_model_and_next_command_of_a_finished_run(topwork, simulated):
    simulated.finish_run()
    code, lines = topwork("status", RUN)
    assert code == 0
    assert lines[0] == f"{RUN} in namespace team-a: succeeded"
    assert f"  model     {MODEL}" in lines
    assert "transfer    done    90s        5        validation_accuracy 0.9100" in lines
    assert "fine-tune   done    90s        10       accuracy 0.9700" in lines
    assert lines[-1] == f"see  topwork models show {MODEL.rstrip('/')}"


def test_status_shows_exit_code_and_error_of_a_failed_run_and_exits_with_0(topwork, simulated):
    simulated.put_pod(
        {"pull": failed("pull", 2, "s3://photos/flowers/ contains no image in a class directory.")}, phase="Failed"
    )
    simulated.patch_job_status(sample_objects.failed_by_policy("pull", 2), failed=1)
    code, lines = topwork("status", "flowers")
    assert code == 0
    assert lines[0] == f"{RUN} in namespace team-a: failed with exit code 2"
    assert "  error     s3://photos/flowers/ contains no image in a class directory" in lines
    assert lines[-1] == f"logs    topwork logs {RUN} -n team-a"


def test_status_shows_how_earlier_attempts_ended(topwork, simulated):
    simulated.put_pod({"pull": failed("pull", 75, "no answer")}, phase="Failed", suffix="first")
    simulated.put_pod({"pull": running()}, suffix="second", created=100)
    simulated.patch_job_status(failed=1)
    _, lines = topwork("status", "flowers")
    assert "  attempts  2, 1 of them counted (retries: 3)" in lines
    assert f"earlier: {RUN}-first failed with exit code 75: no answer" in lines


def test_status_counts_evictions_for_lack_of_disk_space(topwork, simulated):
    pressure = "The node was low on resource: ephemeral-storage. Threshold quantity: 10Gi, available: 9Gi. "
    evicted = {"reason": "Evicted", "phase": "Failed"}
    conditions = (sample_objects.disruption("TerminationByKubelet", pressure),)
    killed = sample_objects.terminated(137)
    full = 'Usage of EmptyDir volume "scratch" exceeds the limit "50Gi". '
    shared = 'Usage of EmptyDir volume "shm" exceeds the limit "2Gi". '
    nearly_full = failed("pull", 75, "Stopped while the disk of the node was nearly full.")
    simulated.put_pod({"pull": killed}, suffix="node", created=1, conditions=conditions, **evicted)
    simulated.put_pod({"pull": nearly_full}, suffix="stop", created=2, conditions=conditions, **evicted)
    simulated.put_pod({"pull": killed}, suffix="full", created=3, message=full, **evicted)
    simulated.put_pod({"pull": killed}, suffix="memory", created=4, message=shared, **evicted)
    simulated.put_pod({"pull": running()}, suffix="now", created=100)
    simulated.patch_job_status(failed=3)
    _, lines = topwork("status", "flowers")
    assert "  attempts  5, 3 of them counted (retries: 3); 3 evicted for lack of disk space" in lines
    earlier = [line.split(": ")[1] for line in lines if line.startswith("earlier")]
    assert earlier == [
        f"{RUN}-node failed with exit code 137 (not counted)",
        f"{RUN}-stop failed with exit code 75",
        f"{RUN}-full failed with exit code 137",
        f"{RUN}-memory failed with exit code 137",
    ]
    data = json.loads("\n".join(topwork("status", "flowers", "--json")[1]))
    assert [attempt["diskEviction"] for attempt in data["attempts"]] == [True, True, True, False, False]


def test_status_explains_a_job_whose_attempts_all_failed_with_75(topwork, simulated):
    errors = ["No GPU is visible.", "403 from s3.example.com.", "No GPU is visible.", "401 from s3.example.com."]
    for index, error in enumerate(errors):
        state = {"pull": failed("pull", 75, error)}
        simulated.put_pod(state, phase="Failed", suffix=f"try{index}", created=index + 1)
    simulated.patch_job_status(sample_objects.backoff_limit_exceeded(), failed=4)
    code, lines = topwork("status", "flowers")
    assert (code, lines[0]) == (0, f"{RUN} in namespace team-a: failed with exit code 75")
    assert "  attempts  4, 4 of them counted (retries: 3)" in lines
    assert "  error     401 from s3.example.com (attempt 4 of 4)" in lines
    assert [line for line in lines if line.startswith("earlier")] == [
        f"earlier: {RUN}-try{index} failed with exit code 75: {error.rstrip('.')}"
        for index, error in enumerate(errors[:3])
    ]


@pytest.mark.parametrize("reason", ["no node", "quota"])
def test_status_explains_why_a_run_is_pending(topwork, simulated, reason):
    if reason == "no node":
        simulated.put_pending_pod(NO_GPUS)
        expected = "no node has 2 free nvidia.com/gpu (insufficient on 3 of 5)"
    else:
        simulated.put_event(simulated.wait_for_job(), "FailedCreate", QUOTA)
        expected = "exceeded quota gpus"
    _, lines = topwork("status", "flowers")
    assert lines[0] == f"{RUN} in namespace team-a: pending"
    (line,) = [line for line in lines if line.startswith("  reason ")]
    assert line.startswith(f"  reason    {expected}")
    _, (header, row) = topwork("list")
    assert header.split() == ["NAME", "RUN", "STAGE", "EPOCH", "BEST", "AGE", "STATUS"]
    assert f"pending: {expected}" in row


def test_status_shows_the_newest_run_of_a_job_and_counts_the_others(topwork, simulated):
    older = sample_objects.job(retries=1)
    older["metadata"] |= {"name": "flowers-00000000", "uid": "older"}
    older["metadata"]["labels"]["topwork.dev/run"] = "flowers-00000000"
    put(simulated.server, older, 2 * THREE_HOURS)
    _, lines = topwork("status", "flowers")
    assert lines[0] == f"{RUN} in namespace team-a: pending"
    assert lines[1] == "  job       flowers, the newest of 2 runs (topwork list)"
    _, lines = topwork("status", "flowers-00000000")
    assert lines[0] == "flowers-00000000 in namespace team-a: pending"
    assert [line.split()[1] for line in topwork("list")[1][1:]] == [RUN, "flowers-00000000"]


@pytest.mark.parametrize("name", [f"job.batch/{RUN}", f"job/{RUN}", f"{RUN}-pull", "transferjob/flowers"])
def test_status_accepts_names_as_kubectl_and_submit_print_them(topwork, simulated, name):
    assert topwork("status", name)[1][0] == f"{RUN} in namespace team-a: pending"


@pytest.mark.parametrize("name", ["nothing", "no/thing", "-", "a" * 70])
def test_unknown_name_lists_the_existing_runs(topwork, simulated, name):
    assert topwork("status", "--", name) == (
        2,
        [f"topwork: no job or run {name} in namespace team-a. Existing runs: {RUN}."],
    )


def test_empty_namespace_suggests_submit(topwork, api_server):
    assert topwork("list") == (0, ["No runs found in namespace team-a."])
    assert topwork("list", "-A") == (0, ["No runs found in any namespace."])
    assert topwork("list", "--json") == (0, ["[]"])
    assert topwork("status", "flowers") == (
        2,
        ["topwork: no job or run flowers in namespace team-a. It has no runs yet: start one with topwork submit FILE."],
    )


def test_follow_requires_a_name(topwork, api_server):
    expected = ["topwork: --follow requires the name of a job or run, and can't be combined with --json."]
    assert topwork("status", "--follow") == (2, expected)
    assert topwork("status", "flowers", "--follow", "--json") == (2, expected)


def test_status_json_has_stable_keys(topwork, simulated):
    simulated.finish_run()
    code, lines = topwork("status", "flowers", "--json")
    data = json.loads("\n".join(lines))
    assert code == 0
    assert data.pop("created")[:4] == str(datetime.now(UTC).year)
    assert data == {
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
        "weightsFrom": None,
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
                "diskEviction": False,
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


def test_list_of_all_namespaces_has_a_namespace_column(topwork, simulated):
    simulated.put_pod(PULLED | {"transfer": running()})
    simulated.server.append_log(POD, "transfer", epoch_line("transfer", 2, 5, 0.9))
    other = sample_objects.job()
    other["metadata"]["uid"] = "other"
    put(simulated.server, other, 10, namespace="default")
    code, lines = topwork("list", "-A")
    assert code == 0
    assert [line.split()[:3] for line in lines[1:]] == [
        ["default", "flowers", RUN],
        ["team-a", "flowers", RUN],
    ]
    assert "2/5" in lines[2]
    assert [line.split()[0] for line in topwork("list")[1][1:]] == ["flowers"]


def test_status_without_a_name_lists_runs(topwork, simulated):
    assert topwork("status") == topwork("list")


def test_list_of_200_runs_sends_5_list_requests_and_reads_48_logs(topwork, api_server):
    for index in range(200):
        job = sample_objects.job()
        name = f"flowers-{index:08x}"
        job["metadata"] |= {"name": name, "uid": f"job-{index}"}
        job["metadata"]["labels"]["topwork.dev/run"] = name
        put(api_server, job, index)
        pod = sample_objects.pod(PULLED | {"transfer": running()}, of=job)
        pod["metadata"]["labels"]["topwork.dev/run"] = name
        api_server.put(pod)
        api_server.append_log(pod["metadata"]["name"], "transfer", epoch_line("transfer", 1, 5, 0.9))
    api_server.requests.clear()
    start = time.monotonic()
    code, lines = topwork("list")
    assert (code, len(lines), time.monotonic() - start < 30) == (0, 201, True)
    logs = [request for request in api_server.requests if request.path.endswith("/log")]
    # TransferSearches, TransferJobs, Jobs, pods and events.
    assert (len(logs), len(api_server.requests) - len(logs)) == (48, 5)
    assert [line.split()[1] for line in lines[1:3]] == ["flowers-00000000", "flowers-00000001"]
    assert sum("1/5" in line for line in lines) == 48


def test_list_without_permission_for_logs_and_events_leaves_columns_empty(topwork, simulated, api_server):
    simulated.put_pod(PULLED | {"transfer": running()})
    api_server.inject(Fault(api_statuses.rbac_denied("get", "pods/log", "team-a"), path="/log"), times=10)
    api_server.inject(Fault(api_statuses.rbac_denied("list", "events", "team-a"), path="/events"), times=10)
    code, lines = topwork("list")
    assert code == 0
    assert lines[1].split()[:3] == ["flowers", RUN, "transfer"]
    assert lines[1].endswith("running")


def test_status_of_a_prefetch_job_is_pulling_ahead(topwork, api_server):
    job = put(api_server, sample_objects.job(role="prefetch"))
    api_server.put(sample_objects.pod({"pull": running()}, of=job))
    _, lines = topwork("status", "flowers")
    assert lines[0] == f"{RUN} in namespace team-a: pulling ahead"


def test_status_and_list_as_separate_processes(kubeconfig, simulated):
    simulated.finish_run()
    for arguments in (("status", "flowers"), ("list",)):
        with Command(*arguments, kubeconfig=kubeconfig) as command:
            assert command.wait() == 0
        assert RUN in command.output
        assert "accuracy 0.9700" in command.output


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0, "0s"), (-5, "0s"), (59, "59s"), (119, "119s"), (120, "2m"), (310, "5m10s"), (660, "11m"), (3600, "60m"),
     (7260, "121m"), (10800, "3h"), (14460, "4h1m"), (36000, "10h"), (90000, "25h"), (180000, "2d2h"), (864000, "10d")],
)  # fmt: skip
def test_durations_are_formatted_as_in_kubectl(seconds, expected):
    assert format_duration(seconds) == expected
