"""Exit codes of the commands for a cluster, as docs/cluster.md lists them: 0 only if a command did what was asked."""

import re
from collections.abc import Callable
from pathlib import Path

import api_statuses
import pytest
import sample_objects
from api_server import ApiServer
from api_statuses import Fault
from sample_objects import NO_GPUS, PULLED, RUN, TRANSFERRED, failed, failed_by_policy, running
from simulated_cluster import SimulatedCluster

from topwork.clients.kubernetes.rest_client import RestClient

PAGE = (Path(__file__).parents[2] / "docs" / "cluster.md").read_text(encoding="utf-8")
POD = f"{RUN}-abcde"
Prepare = Callable[[SimulatedCluster], object]


def documented_codes() -> dict[tuple[str, str], str]:
    """Return the exit codes in the first table of the section, by command and situation."""
    section = PAGE.partition("## Exit codes of commands\n")[2].partition("The commands for storage")[0]
    rows = re.findall(r"^\| `([^`]+)` \| (.+) \| (.+) \|$", section, re.MULTILINE)
    return {(command, situation): code for command, situation, code in rows}


def put_job(simulated: SimulatedCluster) -> None:
    simulated.server.put(sample_objects.job())


def start(simulated: SimulatedCluster) -> None:
    put_job(simulated)
    simulated.put_pod(PULLED | {"transfer": running(100)})
    simulated.server.append_log(POD, "pull", "one")


def fail(simulated: SimulatedCluster) -> None:
    put_job(simulated)
    simulated.put_pod({"pull": failed("pull", 2, "no such bucket")}, phase="Failed")
    simulated.server.append_log(POD, "pull", "one")
    simulated.patch_job_status(failed_by_policy("pull", 2), failed=1)


def wait_for_gpus(simulated: SimulatedCluster) -> None:
    put_job(simulated)
    simulated.put_pending_pod(NO_GPUS)


def lose_node(simulated: SimulatedCluster) -> None:
    fail(simulated)
    timeout = api_statuses.status(500, "", "dial tcp 10.0.0.9:10250: i/o timeout")
    simulated.server.inject(Fault(timeout, path="/log"), times=99)


def fine_tune_without_metrics(simulated: SimulatedCluster) -> None:
    put_job(simulated)
    simulated.put_pod(TRANSFERRED | {"fine-tune": running(200)})


def nothing(_: SimulatedCluster) -> None:
    """Leave the namespace empty."""


SITUATIONS: dict[tuple[str, str], list[tuple[Prepare, list[str]]]] = {
    ("status", "the run exists, whatever its phase"): [
        (start, ["status", "flowers"]),
        (fail, ["status", "flowers"]),
        (wait_for_gpus, ["status", RUN]),
    ],
    ("status", "no such job or run"): [(start, ["status", "roses"]), (nothing, ["status", "flowers"])],
    ("list", "there are no runs"): [(nothing, ["list"]), (nothing, ["status"])],
    ("logs", "the logs of all containers that have started are printed"): [
        (start, ["logs", "flowers"]),
        (fail, ["logs", RUN]),
        (fail, ["logs", "flowers", "-f"]),
    ],
    ("logs", "the run, or the stage, has not started yet"): [
        (put_job, ["logs", "flowers"]),
        (wait_for_gpus, ["logs", "flowers"]),
        (start, ["logs", "flowers", "--stage", "fine-tune"]),
    ],
    ("logs", "the run has ended, and the stage never started"): [
        (fail, ["logs", "flowers", "--stage", "transfer"]),
        (fail, ["logs", "flowers", "--stage", "transfer", "--follow"]),
    ],
    ("logs", "the log of a container can't be read: its node does not respond. The other logs are printed"): [
        (lose_node, ["logs", "flowers"]),
    ],
    ("logs", "no such job or run"): [(nothing, ["logs", "flowers"]), (start, ["logs", "roses", "-f"])],
    ("cancel", "the run is canceled, or it was finished"): [
        (start, ["cancel", "flowers", "--now"]),
        (fail, ["cancel", RUN]),
    ],
    ("cancel", "no such job or run"): [(start, ["cancel", "roses"]), (nothing, ["cancel", "flowers"])],
    ("top", "no run is in progress in the namespace"): [(nothing, ["top", "-n", "team-a"])],
    ("top --once", "a running container does not answer"): [
        (fine_tune_without_metrics, ["top", "-n", "team-a", "--once", "--interval", "0.2"]),
        (fine_tune_without_metrics, ["top", "flowers", "-n", "team-a", "--json", "--interval", "0.2"]),
    ],
    ("top", "no such job or run"): [(start, ["top", "roses", "-n", "team-a"])],
    ("status --follow", "the run fails"): [(fail, ["status", "flowers", "--follow"])],
}
# Tested in test_submit.py, test_submit_source.py and test_follow.py.
ELSEWHERE = {
    ("submit", "the same run exists with the same settings: it is left unchanged"),
    ("submit", "the same run is not finished, and `--restart` is given or its plain Job has different settings"),
    ("submit", "the source cannot be checked from here: a note says so"),
    ("submit", "the source does not exist, or `--pinned` finds no dataset"),
    ("status --follow", "the run is canceled, or its TransferJob or plain Job is deleted"),
}
CODE_OF_RUN = {"that of the run": "2"}


def test_every_documented_situation_is_tested():
    assert set(documented_codes()) == {*SITUATIONS, *ELSEWHERE}


@pytest.mark.parametrize(
    ("row", "prepare", "arguments"),
    [(row, *case) for row, cases in SITUATIONS.items() for case in cases],
    ids=[f"{' '.join(case[1])} {case[0].__name__}" for cases in SITUATIONS.values() for case in cases],
)
def test_exit_code_is_the_documented_one(
    api_server: ApiServer, topwork, monkeypatch: pytest.MonkeyPatch, row, prepare: Prepare, arguments
):
    monkeypatch.setattr(RestClient, "backoff_seconds", lambda *_: 0.01)
    prepare(SimulatedCluster(api_server))
    code = documented_codes()[row]
    assert str(topwork(*arguments)[0]) == CODE_OF_RUN.get(code, code)
