"""`topwork logs` with a simulated cluster."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path

import api_statuses
import pytest
import sample_objects
from api_server import ApiServer
from api_statuses import Fault
from sample_objects import NO_GPUS, PULLED, RUN, TRANSFERRED, done, failed, running, terminated
from simulated_cluster import Command, SimulatedCluster

from topwork.clients.kubernetes.cluster import Cluster
from topwork.cluster.operations.logs import ContainerHeading, Note, RunLog
from topwork.cluster.operations.runs import read_run_objects
from topwork.cluster.status.run_status import read_run_status
from topwork.errors import UnavailableError

POD = f"{RUN}-abcde"
PULL_POD = f"{RUN}-pull-abcde"


@pytest.fixture
def simulated(api_server: ApiServer) -> SimulatedCluster:
    """A cluster with the Job of a run, but no pod yet."""
    api_server.put(sample_objects.job())
    return SimulatedCluster(api_server)


def format_entries(entries: Iterable[ContainerHeading | str | Note]) -> list[str]:
    """Return headings as `# pod stage`, notes as `! text`, and log lines unchanged."""
    lines = []
    for entry in entries:
        if isinstance(entry, ContainerHeading):
            lines.append(f"# {entry.pod} {entry.stage}")
        else:
            lines.append(f"! {entry.text}" if isinstance(entry, Note) else entry)
    return lines


def run_later(*steps: Callable[[], object], pause: float = 0.2) -> None:
    def run() -> None:
        for step in steps:
            time.sleep(pause)
            step()

    threading.Thread(target=run, daemon=True).start()


def logs(kubeconfig: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "KUBECONFIG": str(kubeconfig), "PYTHONWARNINGS": "error"}
    command = [sys.executable, "-m", "topwork", "logs", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


# ── Reading ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_logs_show_containers_in_order_with_headings(simulated: SimulatedCluster, cluster: Cluster):
    simulated.put_pod(TRANSFERRED | {"fine-tune": running(200)})
    for stage in ("fine-tune", "pull", "transfer"):
        simulated.server.append_log(POD, stage, f"{stage} 1", f"{stage} 2")
    assert format_entries(RunLog(cluster, RUN).read()) == [
        f"# {POD} pull",
        "pull 1",
        "pull 2",
        f"# {POD} transfer",
        "transfer 1",
        "transfer 2",
        f"# {POD} fine-tune",
        "fine-tune 1",
        "fine-tune 2",
    ]


def test_logs_of_one_stage(simulated: SimulatedCluster, cluster: Cluster):
    simulated.put_pod(PULLED | {"transfer": running(100)})
    for stage in ("pull", "transfer"):
        simulated.server.append_log(POD, stage, stage)
    assert format_entries(RunLog(cluster, RUN, "transfer").read()) == [f"# {POD} transfer", "transfer"]


def test_logs_show_the_prefetch_job_first_then_attempts_by_age(simulated: SimulatedCluster, cluster: Cluster):
    simulated.server.put(sample_objects.job(role="prefetch"))
    simulated.put_pod(
        PULLED | {"transfer": failed("transfer", 75, "no storage")}, suffix="zzzzz", created=1, phase="Failed"
    )
    simulated.put_pod(PULLED | {"transfer": running(500)}, suffix="aaaaa", created=400)
    simulated.put_pod({"pull": done("pull")}, job=f"{RUN}-pull", created=500, phase="Succeeded")
    simulated.server.append_log(PULL_POD, "pull", "ahead")
    for suffix in ("zzzzz", "aaaaa"):
        for stage in ("pull", "transfer"):
            simulated.server.append_log(f"{RUN}-{suffix}", stage, f"{suffix} {stage}")
    assert [line for line in format_entries(RunLog(cluster, RUN).read()) if line[0] != "#"] == [
        "ahead",
        "zzzzz pull",
        "zzzzz transfer",
        "aaaaa pull",
        "aaaaa transfer",
    ]


def test_logs_of_a_pending_run_explain_why(simulated: SimulatedCluster, cluster: Cluster):
    simulated.put_pending_pod(NO_GPUS)
    reason = read_run_status(read_run_objects(cluster, RUN)).reason
    assert reason is not None
    assert reason.startswith("no node has 2 free nvidia.com/gpu")
    assert format_entries(RunLog(cluster, RUN).read()) == [f"! {RUN} has not started yet: {reason}."]


def test_logs_of_a_stage_that_has_not_started(simulated: SimulatedCluster, cluster: Cluster):
    simulated.put_pod({"pull": running()})
    assert format_entries(RunLog(cluster, RUN, "transfer").read()) == [
        f"! The stage transfer of {RUN} has not started yet."
    ]


def test_unreachable_node_does_not_hide_logs_of_other_pods(
    simulated: SimulatedCluster, api_server: ApiServer, make_cluster: Callable[..., Cluster]
):
    for suffix, since in (("aaaaa", 1), ("bbbbb", 100)):
        simulated.put_pod({"pull": terminated(1)}, suffix=suffix, created=since, phase="Failed")
        simulated.server.append_log(f"{RUN}-{suffix}", "pull", suffix)
    message = 'Get "https://10.0.0.9:10250/containerLogs/team-a/p/pull": dial tcp 10.0.0.9:10250: i/o timeout'
    api_server.inject(Fault(api_statuses.status(500, "", message), path="aaaaa/log"), times=2)
    assert format_entries(RunLog(make_cluster(attempts=2), RUN).read()) == [
        f"# {RUN}-aaaaa pull",
        f"! {api_server.url} could not read the log of Pod {RUN}-aaaaa in team-a (500: {message}). Try again later.",
        f"# {RUN}-bbbbb pull",
        "bbbbb",
    ]
    api_server.inject(Fault(api_statuses.status(500, "", message), path="aaaaa/log"), times=2)
    notes = [entry for entry in RunLog(make_cluster(attempts=2), RUN).read() if isinstance(entry, Note)]
    assert [note.exit_code for note in notes] == [75]


# ── Following ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_follow_continues_across_containers_until_the_job_is_finished(simulated: SimulatedCluster, cluster: Cluster):
    simulated.put_pod({"pull": running()})
    simulated.server.append_log(POD, "pull", "one")
    run_later(
        lambda: simulated.server.append_log(POD, "pull", "two"),
        lambda: simulated.put_pod(PULLED | {"transfer": running(100)}),
        lambda: simulated.server.append_log(POD, "transfer", "three"),
        lambda: simulated.put_pod(TRANSFERRED | {"fine-tune": running(200)}),
        lambda: simulated.server.append_log(POD, "fine-tune", "four"),
        simulated.finish_run,
    )
    assert format_entries(RunLog(cluster, RUN).follow()) == [
        f"# {POD} pull",
        "one",
        "two",
        f"# {POD} transfer",
        "three",
        f"# {POD} fine-tune",
        "four",
    ]


def test_follow_continues_with_the_next_attempt(simulated: SimulatedCluster, cluster: Cluster):
    simulated.put_pod({"pull": running()}, suffix="first")
    simulated.server.append_log(f"{RUN}-first", "pull", "one")
    killed = {"pull": terminated(137, reason="OOMKilled")}
    run_later(
        lambda: simulated.put_pod(killed, suffix="first", phase="Failed"),
        lambda: simulated.put_pod({"pull": running()}, suffix="second", created=200),
        lambda: simulated.server.append_log(f"{RUN}-second", "pull", "two"),
        lambda: simulated.patch_job_status(sample_objects.backoff_limit_exceeded()),
        lambda: simulated.put_pod(killed, suffix="second", created=200, phase="Failed"),
    )
    assert [line for line in format_entries(RunLog(cluster, RUN).follow()) if not line.startswith("!")] == [
        f"# {RUN}-first pull",
        "one",
        f"# {RUN}-second pull",
        "two",
    ]


def test_follow_explains_once_why_a_run_is_pending(simulated: SimulatedCluster, cluster: Cluster):
    simulated.put_pending_pod(NO_GPUS)
    reason = read_run_status(read_run_objects(cluster, RUN)).reason
    entries = RunLog(cluster, RUN).follow()
    assert format_entries(islice(entries, 1)) == [f"! waiting: {reason}"]
    run_later(
        lambda: simulated.put_pod({"pull": running()}),
        lambda: simulated.server.append_log(POD, "pull", "one"),
        lambda: simulated.patch_job_status(sample_objects.deadline_exceeded()),
        lambda: simulated.put_pod({"pull": terminated(143)}, phase="Failed"),
    )
    assert format_entries(entries) == [f"# {POD} pull", "one"]


def test_follow_ends_when_the_job_is_deleted(simulated: SimulatedCluster, cluster: Cluster):
    simulated.put_pod({"pull": running()})
    simulated.server.append_log(POD, "pull", "one")
    run_later(lambda: simulated.server.remove("Job", RUN), lambda: simulated.server.remove("Pod", POD))
    assert format_entries(RunLog(cluster, RUN).follow()) == [f"# {POD} pull", "one"]


def test_follow_of_a_stage_ends_when_the_stage_is_done(simulated: SimulatedCluster, cluster: Cluster):
    simulated.put_pod({"pull": running()})
    run_later(
        lambda: simulated.server.append_log(POD, "pull", "one"),
        lambda: simulated.put_pod(PULLED | {"transfer": running(100)}),
    )
    assert format_entries(RunLog(cluster, RUN, "pull").follow()) == [f"# {POD} pull", "one"]


def test_follow_survives_an_outage_of_the_api_server(
    simulated: SimulatedCluster, api_server: ApiServer, make_cluster: Callable[..., Cluster]
):
    """Logs are retried for longer than other requests: API servers may be down for minutes during an upgrade."""
    simulated.put_pod({"pull": running()})
    simulated.server.append_log(POD, "pull", "one")
    api_server.inject(Fault(cut_after_bytes=45, path="/log"))
    api_server.inject(Fault(api_statuses.service_unavailable(), path="/log"), times=6)
    run_later(
        lambda: simulated.server.append_log(POD, "pull", "two"),
        lambda: simulated.put_pod(PULLED),
        simulated.finish_run,
        pause=0.5,
    )
    lines = format_entries(RunLog(make_cluster(attempts=2, log_outage_seconds=30), RUN, "pull").follow())
    assert lines == [f"# {POD} pull", "one", "two"]


def test_follow_raises_an_error_after_a_long_outage(
    simulated: SimulatedCluster, kubeconfig: Path, make_cluster: Callable[..., Cluster]
):
    simulated.put_pod({"pull": running()})
    simulated.server.inject(Fault(api_statuses.service_unavailable(), path="/log"), times=100)
    with pytest.raises(UnavailableError, match="could not read the log of Pod"):
        format_entries(RunLog(make_cluster(attempts=2, log_outage_seconds=0.1), RUN).follow())


# ── The command ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_only_log_lines_go_to_standard_output(simulated: SimulatedCluster, kubeconfig: Path):
    simulated.put_pod(TRANSFERRED | {"fine-tune": sample_objects.published()}, phase="Succeeded")
    simulated.complete_job()
    for stage in ("pull", "transfer", "fine-tune"):
        simulated.server.append_log(
            POD, stage, json.dumps({"stage": stage, "name": "Chrysanthème"}, ensure_ascii=False)
        )
    completed = logs(kubeconfig, "flowers")
    assert completed.returncode == 0, completed.stderr
    assert [json.loads(line)["stage"] for line in completed.stdout.splitlines()] == ["pull", "transfer", "fine-tune"]
    assert completed.stderr == "".join(f"── {POD} {stage} ──\n" for stage in ("pull", "transfer", "fine-tune"))


def test_unknown_name_lists_the_existing_runs(simulated: SimulatedCluster, kubeconfig: Path):
    completed = logs(kubeconfig, "roses")
    assert (completed.returncode, completed.stdout) == (2, "")
    assert completed.stderr == f"topwork: no job or run roses in namespace team-a. Existing runs: {RUN}.\n"


def test_log_that_the_kubelet_cannot_read_is_not_printed_as_a_line(simulated: SimulatedCluster, kubeconfig: Path):
    simulated.put_pod({"pull": terminated(1)}, phase="Failed")
    simulated.server.append_log(POD, "pull", "unable to retrieve container logs for containerd://0123456789abcdef")
    completed = logs(kubeconfig, "flowers")
    assert (completed.returncode, completed.stdout) == (75, "")
    assert completed.stderr.splitlines()[1] == (
        f"The node of {POD} is unable to retrieve container logs for containerd://0123456789abcdef."
    )


def test_deleted_pod_has_no_log(simulated: SimulatedCluster, cluster: Cluster):
    simulated.put_pod({"pull": terminated(1)}, phase="Failed")
    simulated.server.append_log(POD, "pull", "one")
    entries = RunLog(cluster, RUN).read()
    assert next(entries) == ContainerHeading(POD, "pull")
    simulated.server.remove("Pod", POD)
    assert list(entries) == [Note(f"Pod {POD} has just been deleted, and its log with it.", 2)]


def test_logs_of_a_pending_run_exit_with_75(simulated: SimulatedCluster, kubeconfig: Path):
    simulated.put_pending_pod(NO_GPUS)
    completed = logs(kubeconfig, "flowers")
    assert (completed.returncode, completed.stdout) == (75, "")
    assert completed.stderr.startswith(f"{RUN} has not started yet: no node has 2 free nvidia.com/gpu")


def test_logs_of_a_stage_that_never_started_exit_with_2(simulated: SimulatedCluster, kubeconfig: Path):
    simulated.put_pod({"pull": failed("pull", 2, "no such bucket")}, phase="Failed")
    simulated.patch_job_status(sample_objects.failed_by_policy("pull", 2), failed=1)
    for options in ((), ("--follow",)):
        completed = logs(kubeconfig, "flowers", "--stage", "fine-tune", *options)
        assert (completed.returncode, completed.stdout) == (2, "")
        assert completed.stderr == (
            f"The stage fine-tune of {RUN} has no log, because it never started: no such bucket.\n"
        )


def test_unknown_stage_is_a_usage_error(simulated: SimulatedCluster, kubeconfig: Path):
    completed = logs(kubeconfig, "flowers", "--stage", "train")
    assert completed.returncode == 2
    assert "'train' is not one of 'pull', 'transfer', 'fine-tune'" in completed.stderr


def test_failed_follow_prints_how_to_follow_again(simulated: SimulatedCluster, kubeconfig: Path):
    simulated.put_pod({"pull": running()})
    simulated.server.inject(Fault(api_statuses.rbac_denied("get", "pods/log", "team-a", POD), path="/log"))
    completed = logs(kubeconfig, "flowers", "-f")
    assert completed.returncode == 2
    lines = completed.stderr.splitlines()
    assert lines[1].startswith("topwork: alice is not allowed to get pods/log in namespace team-a. ")
    assert lines[2] == "The job continues. Follow it again with: topwork logs flowers -n team-a -f"


def test_ctrl_c_does_not_stop_the_run_and_prints_how_to_follow_again(simulated: SimulatedCluster, kubeconfig: Path):
    simulated.put_pod({"pull": running()})
    simulated.server.append_log(POD, "pull", "one")
    with Command("logs", RUN, "--stage", "pull", "-f", kubeconfig=kubeconfig) as command:
        command.expect("one")
        command.process.send_signal(signal.SIGINT)
        assert command.wait() == 130
    assert command.lines == [
        f"── {POD} pull ──",
        "one",
        "",
        f"The job continues. Follow it again with: topwork logs {RUN} -n team-a --stage pull -f",
    ]
    assert simulated.server.get("Job", RUN) is not None


def test_closed_pipe_ends_the_command_without_an_error(simulated: SimulatedCluster, kubeconfig: Path):
    simulated.put_pod(PULLED | {"transfer": running(100)})
    simulated.server.append_log(POD, "pull", *("x" * 1000 for _ in range(500)))
    command = f"{sys.executable} -m topwork logs flowers --kubeconfig {kubeconfig} | head -n 1"
    completed = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert completed.stdout == "x" * 1000 + "\n"
    assert completed.stderr == f"── {POD} pull ──\n"
