"""What a container tells, and what it must not."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from topwork.cluster.termination_message import MOST_BYTES, Ending, read_ending

SCRIPT = """
import sys
from pathlib import Path
from topwork.cli.runtime.container import Container
from topwork.clients.prometheus.metrics import Metrics
from topwork.errors import DataError, GateError, SpecError, Stopped, UnavailableError

container = Container("transfer", Path(sys.argv[1]))
container.run = "tiny-12345678"
container.metrics = Metrics()
container.metrics.epoch("transfer", 3)
container.metrics.best("transfer", "accuracy", "validation", 0.75)
{then}
"""


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """The file that the kubelet makes for a termination message."""
    path = tmp_path / "termination-log"
    path.touch()
    return path


@pytest.fixture
def told(log: Path, monkeypatch: pytest.MonkeyPatch):
    """Let a container end in a process of its own: gives exit code, lines of JSON, other text, termination message."""

    def tell(then: str) -> tuple[int, list[dict[str, object]], str, Ending | None]:
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT.format(then=then), log], capture_output=True, text=True, check=False
        )
        lines = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
        for line in lines:
            assert line.pop("time").endswith("Z")
        others = "".join(line for line in done.stderr.splitlines(keepends=True) if not line.startswith("{"))
        assert done.stdout == ""
        return done.returncode, lines, others, read_ending(log.read_text())

    return tell


def test_a_stage_that_is_done_tells_its_best_metric(told):
    _, lines, others, ending = told("container.done(epochs=3)")
    assert (lines, others) == ([{"message": "done", "stage": "transfer", "run": "tiny-12345678", "epochs": 3}], "")
    assert ending == Ending(
        stage="transfer",
        outcome="done",
        exit_code=0,
        run="tiny-12345678",
        epochs=3,
        metric="validation_accuracy",
        value=0.75,
    )


def test_a_published_model_is_told_with_its_own_metric(told):
    _, _, _, ending = told("container.done(metric=('auc', 0.9), model='s3://b/models/tiny/1')")
    assert (ending.metric, ending.value, ending.model) == ("auc", 0.9, "s3://b/models/tiny/1")


@pytest.mark.parametrize(
    ("error", "outcome", "code"),
    [
        ("SpecError", "failed", 2),
        ("GateError", "failed", 3),
        ("UnavailableError", "failed", 75),
        ("Stopped", "stopped", 143),
    ],
)
def test_a_failure_is_one_line_of_json_and_the_termination_message(told, error, outcome, code):
    ended, lines, others, ending = told(f"sys.exit(container.failed({error}('Why.')))")
    level = {"level": "error"} if outcome == "failed" else {}
    assert (ended, others) == (code, "")
    assert lines == [{"message": "Why.", "stage": "transfer", "run": "tiny-12345678", "exit_code": code, **level}]
    assert ending == Ending(
        stage="transfer",
        outcome=outcome,
        exit_code=code,
        run="tiny-12345678",
        epochs=3,
        metric="validation_accuracy",
        value=0.75,
        error="Why.",
    )


def test_a_bug_keeps_its_traceback_after_its_line(told):
    ended, lines, others, ending = told(
        "try: {}['epochs']\nexcept BaseException as error: sys.exit(container.failed(error))"
    )
    assert ended == 1
    assert [line["message"] for line in lines] == ["KeyError: 'epochs'"]
    assert others.startswith("Traceback (most recent call last):\n")
    assert others.endswith("KeyError: 'epochs'\n")
    assert (ending.outcome, ending.exit_code, ending.error) == ("failed", 1, "KeyError: 'epochs'")


@pytest.mark.parametrize(("code", "exit_code"), [(9, 9), (0, 1), ("'text'", 1)])
def test_a_library_that_ends_the_process_is_a_failure(told, code, exit_code):
    ended, _, _, ending = told(f"sys.exit(container.failed(SystemExit({code})))")
    assert (ended, ending.outcome, ending.exit_code) == (exit_code, "failed", exit_code)


def test_a_library_that_is_missing_is_named_with_the_extra_that_brings_it(told):
    ended, _, others, ending = told("sys.exit(container.failed(ModuleNotFoundError(name='tensorflow')))")
    assert (ended, others) == (2, "")
    assert ending.error.startswith("tensorflow is not installed. To train and predict, install topwork[cpu]")


def test_secrets_are_in_no_message_and_no_traceback(told, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "FwoGZXIvYXdzE")
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", "/var/run/token")
    _, lines, others, ending = told(
        "try: raise KeyError('wJalrXUtnFEMI FwoGZXIvYXdzE /var/run/token http://ada:pass@proxy:3128')\n"
        "except BaseException as error: container.failed(error)"
    )
    safe = "KeyError: '*** *** /var/run/token http://***@proxy:3128'"
    assert (lines[0]["message"], ending.error) == (safe, safe)
    assert others.endswith(f"{safe}\n")
    assert "wJalrXUtnFEMI" not in others


def test_a_message_that_is_too_long_is_cut_and_still_read(told, log):
    _, _, _, ending = told("container.failed(DataError('\"ü\\n' * 5000 + '\\udce4'))")
    assert MOST_BYTES - 300 < len(log.read_bytes()) <= MOST_BYTES
    assert ending.error.endswith("…")


def test_only_the_first_ending_counts(told):
    ended, lines, _, ending = told("container.done()\nsys.exit(container.failed(Stopped('Late.')))")
    assert (ended, ending.outcome, len(lines)) == (0, "done", 1)


def test_no_file_is_made_where_there_is_no_kubelet(told, log):
    log.unlink()
    script = SCRIPT.format(then="container.done()")
    subprocess.run([sys.executable, "-c", script, log], capture_output=True, check=True)
    assert not log.exists()


def test_what_libraries_log_and_warn_of_is_json(told):
    _, lines, others, _ = told(
        "import logging, warnings\n"
        "logging.getLogger('absl').warning('slow %s', 'input')\n"
        "logging.getLogger('absl').info('chatter')\n"
        "warnings.warn('old', UserWarning)"
    )
    assert others == ""
    assert lines[0] == {"message": "slow input", "level": "warning", "logger": "absl"}
    assert (lines[1]["level"], lines[1]["logger"]) == ("warning", "py.warnings")
    assert "UserWarning: old" in lines[1]["message"]


def test_a_container_that_ends_at_once_has_no_afterword(told):
    """Python's resource tracker, a process of its own, finds semaphores of the decoders' queues when it is gone."""
    code, lines, others, _ = told(
        "import multiprocessing\nqueue = multiprocessing.get_context('spawn').Queue()\ncontainer.leave(143)"
    )
    assert (code, lines, others) == (143, [], "")


def test_what_is_said_while_start_up_talk_is_kept_away_arrives(told):
    _, lines, others, _ = told(
        "import os\nfrom topwork.cli.runtime.environment import hushed\n"
        "with hushed():\n    os.write(2, b'talk')\n    container.log.note('here')"
    )
    assert (lines, others) == ([{"message": "here"}], "")
