"""A container of a job: log lines, exit code and termination message."""

import errno
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from topwork.cli.runtime.shutdown import to_topwork_error
from topwork.cluster.termination_message import MAX_BYTES, TerminationMessage, parse_termination_message

SCRIPT = """
import sys
from pathlib import Path
from topwork.cli.runtime.container import Container
from topwork.clients.prometheus.metrics import Metrics
from topwork.errors import DataError, GateError, SpecError, Stopped, UnavailableError

container = Container("transfer", Path(sys.argv[1]))
container.run = "tiny-12345678"
container.metrics = Metrics()
container.metrics.set_epoch("transfer", 3)
container.metrics.set_best_metric("transfer", "accuracy", "validation", 0.75)
{statements}
"""


@pytest.fixture
def termination_log(tmp_path: Path) -> Path:
    """The file that the kubelet creates for a termination message."""
    path = tmp_path / "termination-log"
    path.touch()
    return path


@pytest.fixture
def run_container(termination_log: Path, monkeypatch: pytest.MonkeyPatch):
    """Run statements in the process of a container; returns exit code, log lines and termination message.

    Every line of the log must be JSON.
    """

    def run(statements: str) -> tuple[int, list[dict[str, object]], TerminationMessage | None]:
        script = SCRIPT.format(statements=statements)
        completed = subprocess.run(
            [sys.executable, "-c", script, termination_log], capture_output=True, text=True, check=False
        )
        lines = [json.loads(line) for line in completed.stderr.splitlines()]
        for line in lines:
            assert line.pop("time").endswith("Z")
        assert completed.stdout == ""
        return completed.returncode, lines, parse_termination_message(termination_log.read_text())

    return run


def test_complete_stage_reports_its_best_metric(run_container):
    _, lines, message = run_container("container.report_success(epochs=3)")
    assert lines == [{"level": "info", "message": "done", "stage": "transfer", "run": "tiny-12345678", "epochs": 3}]
    assert message == TerminationMessage(
        stage="transfer",
        outcome="done",
        exit_code=0,
        run="tiny-12345678",
        epochs=3,
        metric="validation_accuracy",
        value=0.75,
    )


def test_published_model_is_reported_with_its_main_metric(run_container):
    _, _, message = run_container("container.report_success(metric=('auc', 0.9), model='s3://b/models/tiny/1')")
    assert (message.metric, message.value, message.model) == ("auc", 0.9, "s3://b/models/tiny/1")


@pytest.mark.parametrize(
    ("error", "outcome", "code"),
    [
        ("SpecError", "failed", 2),
        ("GateError", "failed", 3),
        ("UnavailableError", "failed", 75),
        ("Stopped", "stopped", 143),
    ],
)
def test_failure_is_one_log_line_and_the_termination_message(run_container, error, outcome, code):
    exit_code, lines, message = run_container(f"sys.exit(container.report_failure({error}('Why.')))")
    level = "error" if outcome == "failed" else "info"
    assert exit_code == code
    assert lines == [
        {"level": level, "message": "Why.", "stage": "transfer", "run": "tiny-12345678", "exit_code": code}
    ]
    assert message == TerminationMessage(
        stage="transfer",
        outcome=outcome,
        exit_code=code,
        run="tiny-12345678",
        epochs=3,
        metric="validation_accuracy",
        value=0.75,
        error="Why.",
    )


def test_bug_is_logged_with_its_traceback(run_container):
    exit_code, lines, message = run_container(
        "try: {}['epochs']\nexcept BaseException as error: sys.exit(container.report_failure(error))"
    )
    assert exit_code == 1
    assert [line["message"] for line in lines] == ["KeyError: 'epochs'"]
    assert lines[0]["traceback"].startswith("Traceback (most recent call last):\n")
    assert lines[0]["traceback"].endswith("KeyError: 'epochs'")
    assert (message.outcome, message.exit_code, message.error) == ("failed", 1, "KeyError: 'epochs'")


@pytest.mark.parametrize(("code", "exit_code"), [(9, 9), (0, 1), ("'text'", 1)])
def test_library_that_calls_sys_exit_is_a_failure(run_container, code, exit_code):
    actual, _, message = run_container(f"sys.exit(container.report_failure(SystemExit({code})))")
    assert (actual, message.outcome, message.exit_code) == (exit_code, "failed", exit_code)


def test_missing_library_error_names_its_extra(run_container):
    exit_code, lines, message = run_container(
        "sys.exit(container.report_failure(ModuleNotFoundError(name='tensorflow')))"
    )
    assert exit_code == 2
    assert "traceback" not in lines[0]
    assert message.error.startswith("tensorflow is not installed. To train and predict, install topwork[cpu]")


def test_messages_and_tracebacks_are_redacted(run_container, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "FwoGZXIvYXdzE")
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", "/var/run/token")
    _, lines, message = run_container(
        "try: raise KeyError('wJalrXUtnFEMI FwoGZXIvYXdzE /var/run/token http://ada:pass@proxy:3128')\n"
        "except BaseException as error: container.report_failure(error)"
    )
    redacted = "KeyError: '*** *** /var/run/token http://***@proxy:3128'"
    assert (lines[0]["message"], message.error) == (redacted, redacted)
    assert lines[0]["traceback"].endswith(redacted)
    assert "wJalrXUtnFEMI" not in json.dumps(lines)


def test_long_termination_message_is_truncated_to_valid_json(run_container, termination_log):
    _, _, message = run_container("container.report_failure(DataError('\"ü ' * 5000 + '\\udce4'))")
    assert MAX_BYTES - 300 < len(termination_log.read_bytes()) <= MAX_BYTES
    assert message.error.endswith("…")


def test_only_the_first_outcome_is_reported(run_container):
    exit_code, lines, message = run_container(
        "container.report_success()\nsys.exit(container.report_failure(Stopped('Late.')))"
    )
    assert (exit_code, message.outcome, len(lines)) == (0, "done", 1)


def test_termination_log_is_not_created_without_a_kubelet(termination_log):
    termination_log.unlink()
    script = SCRIPT.format(statements="container.report_success()")
    subprocess.run([sys.executable, "-c", script, termination_log], capture_output=True, check=True)
    assert not termination_log.exists()


def test_library_logs_and_warnings_are_json(run_container):
    _, lines, _ = run_container(
        "import logging, warnings\n"
        "logging.getLogger('absl').warning('slow %s', 'input')\n"
        "logging.getLogger('absl').info('chatter')\n"
        "warnings.warn('old', UserWarning)"
    )
    assert lines[0] == {"level": "warning", "message": "slow input", "logger": "absl"}
    assert (lines[1]["level"], lines[1]["logger"]) == ("warning", "py.warnings")
    assert "UserWarning: old" in lines[1]["message"]


def test_container_prints_nothing_after_an_immediate_exit(run_container):
    """Python's resource tracker, a separate process, finds leaked semaphores of the decoders' queues."""
    code, lines, _ = run_container(
        "import multiprocessing\nqueue = multiprocessing.get_context('spawn').Queue()\ncontainer.exit(143)"
    )
    assert (code, lines) == (143, [])


def test_exit_after_timeout_does_not_wait_for_a_blocked_log(run_container):
    code, lines, message = run_container(
        "import logging, threading\nlogging.getLogger().handlers[0].acquire()\n"
        "threading.Thread(target=container.exit_after_timeout, args=('Late.',)).start()\nthreading.Event().wait(30)"
    )
    assert (code, lines, message.outcome, message.error) == (143, [], "stopped", "Late.")


def test_exit_after_timeout_is_logged(run_container):
    code, lines, _ = run_container("container.exit_after_timeout('Late.')")
    assert code == 143
    assert lines == [
        {"level": "info", "message": "Late.", "stage": "transfer", "run": "tiny-12345678", "exit_code": 143}
    ]


def test_log_lines_are_written_while_stderr_is_suppressed(run_container):
    _, lines, _ = run_container(
        "import os, structlog\nfrom topwork.cli.runtime.tensorflow_import import suppress_stderr\n"
        "with suppress_stderr():\n    os.write(2, b'startup')\n    structlog.get_logger('topwork').info('here')"
    )
    assert lines == [{"level": "info", "message": "here"}]


def allocate_too_much() -> None:
    np.empty(1 << 60, np.float32)


def fail_with_a_memory_error_as_cause() -> None:
    try:
        raise MemoryError("std::bad_alloc")
    except MemoryError as error:
        raise RuntimeError("Layer failed.") from error


def fork_without_memory() -> None:
    raise OSError(errno.ENOMEM, "Cannot allocate memory")


@pytest.mark.parametrize(
    ("fail", "reason"),
    [
        (allocate_too_much, "Unable to allocate 4.00 EiB for an array"),
        (fail_with_a_memory_error_as_cause, "std::bad_alloc"),
        (fork_without_memory, "[Errno 12] Cannot allocate memory"),
    ],
)
def test_exhausted_memory_is_not_retried_and_suggests_what_to_change(fail, reason):
    with pytest.raises(Exception) as caught:
        fail()
    error = to_topwork_error(caught.value)
    assert error.exit_code == 2
    assert str(error).startswith(f"Memory is exhausted ({reason}")
    assert "raise spec.compute.memory" in str(error)


def test_process_ends_after_its_timeout_even_if_it_cannot_report_that(run_container):
    code, _, message = run_container(
        "import threading\ncontainer.metrics.stage_progress = None\n"
        "threading.Thread(target=container.exit_after_timeout, args=('Late.',)).start()\nthreading.Event().wait(30)"
    )
    assert (code, message) == (143, None)


def test_exit_code_is_kept_if_nothing_reads_the_output(termination_log):
    script = SCRIPT.format(statements="import os\nprint('x')\nos.close(1)\nos.close(2)\ncontainer.exit(75)")
    process = subprocess.run([sys.executable, "-c", script, termination_log], capture_output=True, check=False)
    assert process.returncode == 75


# ── Several nodes ───────────────────────────────────────────────────────────────────────────────────────────────────

TWO_NODES = """
from topwork.nodes.group import NodeGroup
from topwork.nodes.node import Node

class Group(NodeGroup):
    def fail(self, error):
        print(f"told the others: {type(error).__name__}: {error}", file=sys.stdout)

container.nodes = Group(Node(1, ("a:1", "b:1"), "a:2"))
"""


def run_node(termination_log: Path, statements: str) -> tuple[int, str, TerminationMessage | None]:
    completed = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(statements=TWO_NODES + statements), termination_log],
        capture_output=True,
        text=True,
        check=False,
    )
    return completed.returncode, completed.stdout, parse_termination_message(termination_log.read_text())


def test_termination_message_names_the_node(termination_log):
    code, output, message = run_node(termination_log, "container.report_success(); container.exit(0)")
    assert (code, output, message.node, message.outcome) == (0, "", 1, "done")


def test_failure_is_told_to_the_other_nodes(termination_log):
    statements = "container.exit(container.report_failure(DataError('No images.')))"
    code, output, message = run_node(termination_log, statements)
    assert (code, output) == (2, "told the others: DataError: No images.\n")
    assert (message.node, message.error) == (1, "No images.")


def test_out_of_memory_is_told_to_the_other_nodes_as_it_is_reported(termination_log):
    _, output, message = run_node(termination_log, "container.exit(container.report_failure(MemoryError()))")
    assert output == f"told the others: SettingError: {message.error}\n"


def test_process_ends_after_the_failure_of_another_node(termination_log):
    code, output, message = run_node(
        termination_log, "container.exit_from_thread(UnavailableError('Lost node 0: killed.'))"
    )
    assert (code, message.outcome, message.exit_code, message.error) == (75, "failed", 75, "Lost node 0: killed.")
    assert output == "told the others: UnavailableError: Lost node 0: killed.\n"


def test_process_stops_with_another_node(termination_log):
    code, _, message = run_node(termination_log, "container.exit_from_thread(Stopped('With node 0.'))")
    assert (code, message.outcome, message.exit_code, message.error) == (143, "stopped", 143, "With node 0.")


def test_draft_of_a_failure_is_the_message_of_a_killed_process(termination_log):
    statements = "container.draft_failure(UnavailableError('Blocked.'))\nimport os; os._exit(75)"
    _, _, message = run_node(termination_log, statements)
    assert (message.node, message.outcome, message.exit_code, message.error) == (1, "failed", 75, "Blocked.")


def test_deleted_draft_leaves_no_message(termination_log):
    statements = "container.draft_failure(UnavailableError('Blocked.'))\ncontainer.draft_failure(None)"
    assert run_node(termination_log, statements) == (0, "", None)


def test_draft_does_not_replace_a_message(termination_log):
    statements = "container.report_success()\ncontainer.draft_failure(UnavailableError('Blocked.'))"
    assert run_node(termination_log, statements)[2].outcome == "done"
