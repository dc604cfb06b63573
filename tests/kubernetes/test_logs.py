"""`topwork logs`, of runs of a played cluster."""

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
import states
from api_server import ApiServer
from api_statuses import Fault
from played import Command, Played
from states import NO_GPUS, PULLED, RUN, TRANSFERRED, done, failed, running, terminated

from topwork.clients.kubernetes.cluster import Cluster
from topwork.cluster.operations.find_runs import read_run
from topwork.cluster.operations.logs import Note, Part, RunLog
from topwork.cluster.status.run_state import run_state
from topwork.errors import UnavailableError

POD = f"{RUN}-abcde"
PULL_POD = f"{RUN}-pull-abcde"


@pytest.fixture
def played(api_server: ApiServer) -> Played:
    """A cluster with the Job of a run, and no pod yet."""
    api_server.put(states.job())
    return Played(api_server)


def told(entries: Iterable[Part | str | Note]) -> list[str]:
    """Headings as `# pod stage`, notes as `! text`, lines as they are."""
    written = []
    for entry in entries:
        if isinstance(entry, Part):
            written.append(f"# {entry.pod} {entry.stage}")
        else:
            written.append(f"! {entry.text}" if isinstance(entry, Note) else entry)
    return written


def later(*steps: Callable[[], object], pause: float = 0.2) -> None:
    def play() -> None:
        for step in steps:
            time.sleep(pause)
            step()

    threading.Thread(target=play, daemon=True).start()


def logs(kubeconfig: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "KUBECONFIG": str(kubeconfig), "PYTHONWARNINGS": "error"}
    command = [sys.executable, "-m", "topwork", "logs", *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


# ── What is written ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_containers_come_in_their_order_each_below_its_heading(played: Played, cluster: Cluster):
    played.pod(TRANSFERRED | {"fine-tune": running(200)})
    for stage in ("fine-tune", "pull", "transfer"):
        played.server.log(POD, stage, f"{stage} 1", f"{stage} 2")
    assert told(RunLog(cluster, RUN).entries()) == [
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


def test_one_stage_alone(played: Played, cluster: Cluster):
    played.pod(PULLED | {"transfer": running(100)})
    for stage in ("pull", "transfer"):
        played.server.log(POD, stage, stage)
    assert told(RunLog(cluster, RUN, "transfer").entries()) == [f"# {POD} transfer", "transfer"]


def test_attempts_come_by_their_age_and_the_job_that_pulled_ahead_first(played: Played, cluster: Cluster):
    played.server.put(states.job(role="prefetch"))
    played.pod(PULLED | {"transfer": failed("transfer", 75, "no storage")}, suffix="zzzzz", created=1, phase="Failed")
    played.pod(PULLED | {"transfer": running(500)}, suffix="aaaaa", created=400)
    played.pod({"pull": done("pull")}, job=f"{RUN}-pull", created=500, phase="Succeeded")
    played.server.log(PULL_POD, "pull", "ahead")
    for suffix in ("zzzzz", "aaaaa"):
        for stage in ("pull", "transfer"):
            played.server.log(f"{RUN}-{suffix}", stage, f"{suffix} {stage}")
    assert [line for line in told(RunLog(cluster, RUN).entries()) if line[0] != "#"] == [
        "ahead",
        "zzzzz pull",
        "zzzzz transfer",
        "aaaaa pull",
        "aaaaa transfer",
    ]


def test_a_run_that_waits_tells_why(played: Played, cluster: Cluster):
    played.pending(NO_GPUS)
    reason = run_state(read_run(cluster, RUN)).reason
    assert reason is not None
    assert reason.startswith("no node has 2 free nvidia.com/gpu")
    assert told(RunLog(cluster, RUN).entries()) == [f"! {RUN} has not run yet: {reason}."]


def test_a_stage_that_has_not_run_is_told(played: Played, cluster: Cluster):
    played.pod({"pull": running()})
    assert told(RunLog(cluster, RUN, "transfer").entries()) == [f"! The stage transfer of {RUN} has not run yet."]


def test_a_pod_whose_node_is_lost_does_not_hide_the_others(
    played: Played, api_server: ApiServer, make_cluster: Callable[..., Cluster]
):
    for suffix, since in (("aaaaa", 1), ("bbbbb", 100)):
        played.pod({"pull": terminated(1)}, suffix=suffix, created=since, phase="Failed")
        played.server.log(f"{RUN}-{suffix}", "pull", suffix)
    why = 'Get "https://10.0.0.9:10250/containerLogs/team-a/p/pull": dial tcp 10.0.0.9:10250: i/o timeout'
    api_server.plant(Fault(api_statuses.status(500, "", why), path="aaaaa/log"), times=2)
    assert told(RunLog(make_cluster(attempts=2), RUN).entries()) == [
        f"# {RUN}-aaaaa pull",
        f"! {api_server.url} could not read the log of Pod {RUN}-aaaaa in team-a (500: {why}). Try again later.",
        f"# {RUN}-bbbbb pull",
        "bbbbb",
    ]


# ── What comes ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_following_goes_from_container_to_container_and_ends_with_the_job(played: Played, cluster: Cluster):
    played.pod({"pull": running()})
    played.server.log(POD, "pull", "one")
    later(
        lambda: played.server.log(POD, "pull", "two"),
        lambda: played.pod(PULLED | {"transfer": running(100)}),
        lambda: played.server.log(POD, "transfer", "three"),
        lambda: played.pod(TRANSFERRED | {"fine-tune": running(200)}),
        lambda: played.server.log(POD, "fine-tune", "four"),
        played.finish,
    )
    assert told(RunLog(cluster, RUN).followed()) == [
        f"# {POD} pull",
        "one",
        "two",
        f"# {POD} transfer",
        "three",
        f"# {POD} fine-tune",
        "four",
    ]


def test_following_goes_on_with_the_next_attempt(played: Played, cluster: Cluster):
    played.pod({"pull": running()}, suffix="first")
    played.server.log(f"{RUN}-first", "pull", "one")
    killed = {"pull": terminated(137, reason="OOMKilled")}
    later(
        lambda: played.pod(killed, suffix="first", phase="Failed"),
        lambda: played.pod({"pull": running()}, suffix="second", created=200),
        lambda: played.server.log(f"{RUN}-second", "pull", "two"),
        lambda: played.status(states.backoff_limit_exceeded()),
        lambda: played.pod(killed, suffix="second", created=200, phase="Failed"),
    )
    assert [line for line in told(RunLog(cluster, RUN).followed()) if not line.startswith("!")] == [
        f"# {RUN}-first pull",
        "one",
        f"# {RUN}-second pull",
        "two",
    ]


def test_following_a_run_that_waits_tells_why_once(played: Played, cluster: Cluster):
    played.pending(NO_GPUS)
    reason = run_state(read_run(cluster, RUN)).reason
    entries = RunLog(cluster, RUN).followed()
    assert told(islice(entries, 1)) == [f"! waiting: {reason}"]
    later(
        lambda: played.pod({"pull": running()}),
        lambda: played.server.log(POD, "pull", "one"),
        lambda: played.status(states.deadline_exceeded()),
        lambda: played.pod({"pull": terminated(143)}, phase="Failed"),
    )
    assert told(entries) == [f"# {POD} pull", "one"]


def test_following_ends_when_the_job_is_gone(played: Played, cluster: Cluster):
    played.pod({"pull": running()})
    played.server.log(POD, "pull", "one")
    later(lambda: played.server.remove("Job", RUN), lambda: played.server.remove("Pod", POD))
    assert told(RunLog(cluster, RUN).followed()) == [f"# {POD} pull", "one"]


def test_following_a_stage_ends_when_it_is_done(played: Played, cluster: Cluster):
    played.pod({"pull": running()})
    later(lambda: played.server.log(POD, "pull", "one"), lambda: played.pod(PULLED | {"transfer": running(100)}))
    assert told(RunLog(cluster, RUN, "pull").followed()) == [f"# {POD} pull", "one"]


def test_following_survives_a_server_that_is_away_for_a_while(
    played: Played, api_server: ApiServer, make_cluster: Callable[..., Cluster]
):
    """More often than other requests are tried: an API server that is upgraded is away for minutes."""
    played.pod({"pull": running()})
    played.server.log(POD, "pull", "one")
    api_server.plant(Fault(cut_after=45, path="/log"))
    api_server.plant(Fault(api_statuses.unavailable(), path="/log"), times=6)
    later(lambda: played.server.log(POD, "pull", "two"), lambda: played.pod(PULLED), played.finish, pause=0.5)
    lines = told(RunLog(make_cluster(attempts=2, patience_seconds=30), RUN, "pull").followed())
    assert lines == [f"# {POD} pull", "one", "two"]


def test_following_gives_up_in_the_end(played: Played, kubeconfig: Path, make_cluster: Callable[..., Cluster]):
    played.pod({"pull": running()})
    played.server.plant(Fault(api_statuses.unavailable(), path="/log"), times=100)
    with pytest.raises(UnavailableError, match="could not read the log of Pod"):
        told(RunLog(make_cluster(attempts=2, patience_seconds=0.1), RUN).followed())


# ── The command ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_lines_alone_go_to_standard_output(played: Played, kubeconfig: Path):
    played.pod(TRANSFERRED | {"fine-tune": states.published()}, phase="Succeeded")
    played.succeed()
    for stage in ("pull", "transfer", "fine-tune"):
        played.server.log(POD, stage, json.dumps({"stage": stage, "name": "Chrysanthème"}, ensure_ascii=False))
    ended = logs(kubeconfig, "flowers")
    assert ended.returncode == 0, ended.stderr
    assert [json.loads(line)["stage"] for line in ended.stdout.splitlines()] == ["pull", "transfer", "fine-tune"]
    assert ended.stderr == "".join(f"── {POD} {stage} ──\n" for stage in ("pull", "transfer", "fine-tune"))


def test_a_name_that_is_none_is_told_with_those_that_are(played: Played, kubeconfig: Path):
    ended = logs(kubeconfig, "roses")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == f"topwork: no job or run roses in namespace team-a. There are: {RUN}.\n"


def test_a_stage_that_is_none_is_an_error_of_usage(played: Played, kubeconfig: Path):
    ended = logs(kubeconfig, "flowers", "--stage", "train")
    assert ended.returncode == 2
    assert "'train' is not one of 'pull', 'transfer', 'fine-tune'" in ended.stderr


def test_a_log_that_does_not_end_is_told_with_the_way_back(played: Played, kubeconfig: Path):
    played.pod({"pull": running()})
    played.server.plant(Fault(api_statuses.rbac("get", "pods/log", "team-a", POD), path="/log"))
    ended = logs(kubeconfig, "flowers", "-f")
    assert ended.returncode == 2
    assert ended.stderr.endswith(
        "says when it is there. The job goes on. Come back with: topwork logs flowers -n team-a -f\n"
    )


def test_ctrl_c_leaves_the_job_and_says_how_to_come_back(played: Played, kubeconfig: Path):
    played.pod({"pull": running()})
    played.server.log(POD, "pull", "one")
    with Command("logs", RUN, "--stage", "pull", "-f", kubeconfig=kubeconfig) as command:
        command.expect("one")
        command.process.send_signal(signal.SIGINT)
        assert command.end() == 130
    assert command.lines == [
        f"── {POD} pull ──",
        "one",
        "",
        f"The job goes on. Come back with: topwork logs {RUN} -n team-a --stage pull -f",
    ]
    assert played.server.get("Job", RUN) is not None


def test_a_reader_that_leaves_ends_the_command_quietly(played: Played, kubeconfig: Path):
    played.pod(PULLED | {"transfer": running(100)})
    played.server.log(POD, "pull", *("x" * 1000 for _ in range(500)))
    command = f"{sys.executable} -m topwork logs flowers --kubeconfig {kubeconfig} | head -n 1"
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert ended.stdout == "x" * 1000 + "\n"
    assert ended.stderr == f"── {POD} pull ──\n"
