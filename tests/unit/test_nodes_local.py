"""Nodes of `topwork run --nodes`: division of GPUs, log lines, and the error of the command."""

import json
from io import StringIO
from types import SimpleNamespace

import pytest
from structlog.testing import capture_logs

from topwork.cli.runtime import local_nodes
from topwork.cli.runtime.local_nodes import LocalNodes, _Ended, _relay, choose_error, open_local_nodes
from topwork.clients.prometheus import gpus
from topwork.cluster.termination_message import TerminationMessage
from topwork.errors import SettingError, Stopped
from topwork.nodes.failure import Failure


@pytest.fixture
def four_gpus(monkeypatch):
    """A machine with four GPUs."""
    nvml = SimpleNamespace(
        NVMLError=RuntimeError,
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 4,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetUUID=lambda handle: f"GPU-{handle}a",
    )
    monkeypatch.setitem(__import__("sys").modules, "pynvml", nvml)


@pytest.mark.parametrize(
    ("count", "visible", "expected"),
    [
        (2, None, ("0,1", "2,3")),
        (4, None, ("0", "1", "2", "3")),
        (2, "1, 3", ("1", "3")),
        (2, "GPU-3,GPU-0", ("GPU-3", "GPU-0")),
        (2, "-1", None),
        (2, "", None),
    ],
)
def test_gpus_are_divided_among_the_nodes(four_gpus, tmp_path, count, visible, expected):
    assert open_local_nodes(count, None, tmp_path, visible) == LocalNodes(count, tmp_path, expected)


@pytest.mark.parametrize(("count", "visible", "found"), [(3, None, 4), (2, "0", 1)])
def test_gpus_that_cannot_be_divided_are_reported(four_gpus, tmp_path, count, visible, found):
    with pytest.raises(SettingError, match=f"--nodes {count} cannot divide {found} GPUs: each node"):
        open_local_nodes(count, None, tmp_path, visible)


def test_nodes_without_gpus_train_on_the_cpu(monkeypatch, tmp_path):
    monkeypatch.setattr(gpus, "open_gpu_collector", lambda _: None)
    assert open_local_nodes(3, None, tmp_path, None) == LocalNodes(3, tmp_path, None)


def test_the_spec_names_the_nodes_and_gpus_of_this_machine(tmp_path):
    assert LocalNodes(2, tmp_path, ("0,1", "2,3")).overrides == ["spec.compute.nodes=2", "spec.compute.gpus=2"]
    assert LocalNodes(3, tmp_path, None).overrides == ["spec.compute.nodes=3", "spec.compute.gpus=0"]


def test_log_lines_of_a_node_are_logged_with_its_index(capsys):
    lines = [
        {"time": "t", "level": "info", "message": "epoch", "epoch": 1, "event": "x"},
        {"time": "t", "level": "error", "message": "ValueError: x", "traceback": "Traceback …"},
    ]
    text = "\n".join([json.dumps(lines[0]), "not JSON", json.dumps(lines[1]), "[1]", '{"level": "info"}'])
    with capture_logs() as events:
        _relay(1, StringIO(text))
    assert events == [
        {"event": "epoch", "epoch": 1, "node": 1, "log_level": "info"},
        {"event": "ValueError: x", "exception": "Traceback …", "node": 1, "log_level": "error"},
    ]
    assert capsys.readouterr().err.splitlines() == [
        "[node 1] not JSON",
        "[node 1] [1]",
        '[node 1] {"level": "info"}',
    ]


ECHO = """
import json, os, sys
environment = {name: os.environ.get(name) for name in ("TF_CPP_MIN_LOG_LEVEL", "JOB_COMPLETION_INDEX")}
print(json.dumps({"level": "info", "message": "started", "arguments": sys.argv[1:3], **environment}))
"""


@pytest.mark.parametrize(("is_verbose", "arguments"), [(False, ["stage", "transfer"]), (True, ["--verbose", "stage"])])
def test_nodes_get_the_environment_and_verbosity_of_the_user(monkeypatch, tmp_path, is_verbose, arguments):
    monkeypatch.setattr(local_nodes, "COMMAND", ECHO)
    monkeypatch.setattr(local_nodes, "is_verbose", lambda: is_verbose)
    monkeypatch.delenv("TF_CPP_MIN_LOG_LEVEL", raising=False)
    nodes = LocalNodes(2, tmp_path, None)
    # Importing TensorFlow in this process sets a level at which nodes would log that others have ended.
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "2")
    with capture_logs() as events:
        local_nodes._Stage(nodes, "transfer", "cats-1", "datasets/cats/1", tmp_path / "job.yaml", None).run()
    started = [event for event in events if event["event"] == "started"]
    assert sorted(event["node"] for event in started) == [0, 1]
    assert {event["TF_CPP_MIN_LOG_LEVEL"] for event in started} == {None}
    assert [event["arguments"] for event in started] == [arguments, arguments]


def ended(index: int, code: int, error: str | None = None) -> _Ended:
    outcome = "failed" if error else "done"
    message = TerminationMessage(stage="transfer", outcome=outcome, exit_code=code, run="tiny-1", error=error)
    return _Ended(index, code, message if error or not code else None)


FOLLOWED = [str(Failure(1, "x", outcome).error()) for outcome in ("failed", "lost")]


@pytest.mark.parametrize(
    ("nodes", "code", "text"),
    [
        ([ended(1, 2, "No images."), ended(0, 75, FOLLOWED[0])], 2, "No images."),
        ([ended(0, 75, FOLLOWED[0]), ended(1, 2, "No images.")], 2, "No images."),
        ([ended(1, 0), ended(0, 3, "Not published.")], 3, "Not published."),
        ([ended(0, 0), ended(1, 75, "No disk space.")], 75, "Node 1 failed: No disk space."),
        ([ended(0, 75, FOLLOWED[1]), ended(1, 143, "Stopped.")], 75, FOLLOWED[1]),
        ([ended(1, 1)], 1, "Node 1 failed: exit code 1"),
    ],
)
def test_the_command_ends_with_the_error_of_the_node_that_failed_first(nodes, code, text):
    error = choose_error(nodes)
    assert (error.exit_code, str(error)) == (code, text)


def test_the_command_stops_if_all_nodes_have_stopped():
    error = choose_error([ended(0, 143, "Stopped."), ended(1, 143, "Stopped because node 0 was stopped.")])
    assert isinstance(error, Stopped)


def test_the_command_names_the_signal_that_killed_a_node():
    error = choose_error([ended(0, 75, FOLLOWED[1]), ended(1, -9)])
    assert (error.exit_code, str(error).partition(".")[0]) == (75, "Node 1 was killed by SIGKILL")


def test_a_frozen_node_that_the_command_killed_is_reported_as_lost():
    error = choose_error([ended(0, 75, FOLLOWED[1]), _Ended(1, -9, None, did_not_end=True)])
    assert (error.exit_code, str(error)) == (75, FOLLOWED[1])


def test_there_is_no_error_if_all_nodes_are_done():
    assert choose_error([ended(0, 0), ended(1, 0)]) is None


def test_free_ports_differ():
    assert len(set(local_nodes._free_ports(20))) == 20
