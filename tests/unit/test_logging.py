"""Log lines: text, JSON and lines on a terminal, of topwork and of libraries."""

import io
import json
import logging
import sys

import pytest
import structlog
from rich.console import Console

from topwork.cli.output.progress import ProgressBars
from topwork.cli.runtime import logging as runtime_logging
from topwork.cli.runtime.logging import LogFormat, configure_logging, is_verbose, set_log_level

log = structlog.get_logger("topwork.tests")


@pytest.fixture
def json_lines():
    """Configure JSON lines; call the fixture to read them."""
    stream = io.StringIO()
    configure_logging(LogFormat.json, stream)
    return lambda: [json.loads(line, parse_constant=pytest.fail) for line in stream.getvalue().splitlines()]


@pytest.fixture
def text_lines():
    """Configure text lines; call the fixture to read them without their timestamps."""
    stream = io.StringIO()
    configure_logging(LogFormat.text, stream)
    return lambda: [line.split("Z ", 1)[1] for line in stream.getvalue().splitlines()]


def test_text_line_has_level_event_and_rounded_fields(text_lines):
    log.info("epoch", stage="transfer", epoch=1, epochs=20, loss=0.123456, accuracy=0.9)
    log.warning("stored", uri="s3://a b/c")
    assert text_lines() == [
        "[info] epoch stage=transfer epoch=1 epochs=20 loss=0.1235 accuracy=0.9",
        "[warning] stored uri='s3://a b/c'",
    ]


def test_json_line_has_time_level_message_then_fields(json_lines):
    log.info("epoch", stage="transfer", epoch=2, epochs=3, loss=0.123456)
    (line,) = json_lines()
    assert list(line) == ["time", "level", "message", "stage", "epoch", "epochs", "loss"]
    assert line.pop("time").endswith("Z")
    assert line == {"level": "info", "message": "epoch", "stage": "transfer", "epoch": 2, "epochs": 3, "loss": 0.123456}


def test_json_line_contains_nan_and_infinity_as_strings(json_lines):
    log.info("epoch", loss=float("nan"), best=float("inf"), values=[float("-inf")])
    (line,) = json_lines()
    assert (line["loss"], line["best"], line["values"]) == ("nan", "inf", ["-inf"])


def test_json_line_of_a_library_contains_its_logger_and_traceback(json_lines):
    try:
        raise ValueError("no bytes")
    except ValueError:
        logging.getLogger("library").exception("read %s", "failed")
    (line,) = json_lines()
    assert (line["level"], line["message"], line["logger"]) == ("error", "read failed", "library")
    assert line["traceback"].startswith("Traceback (most recent call last):\n")
    assert line["traceback"].endswith("ValueError: no bytes")


def test_percent_signs_in_an_event_are_kept(json_lines):
    log.info("100% of %s")
    assert json_lines()[0]["message"] == "100% of %s"


def test_record_that_cannot_be_formatted_is_dropped(json_lines, capsys):
    logging.getLogger("library").warning("%d", "a secret")
    log.info("next")
    assert [line["message"] for line in json_lines()] == ["next"]
    assert capsys.readouterr().err == ""


def test_debug_messages_are_logged_only_when_verbose(text_lines):
    log.debug("first")
    assert not is_verbose()
    set_log_level(logging.DEBUG)
    log.debug("second")
    logging.getLogger("library").info("hidden")
    assert is_verbose()
    assert text_lines() == ["[debug] second"]


def test_configuring_again_replaces_the_handler(text_lines, json_lines):
    log.info("once")
    assert (text_lines(), len(json_lines())) == ([], 1)


@pytest.fixture
def terminal(monkeypatch):
    """Make standard error a terminal; returns its console and the stream that the console prints to."""
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, color_system=None, width=60)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(runtime_logging, "stderr_console", lambda: console)
    configure_logging()
    return console, stream


def test_terminal_line_is_neither_wrapped_nor_read_as_markup(terminal):
    _, stream = terminal
    log.info("class [red]x[/red]", name="[bold]y[/bold]", long="z" * 80)
    assert stream.getvalue() == f"[info] class [red]x[/red] name=[bold]y[/bold] long={'z' * 80}\n"


def test_terminal_line_is_printed_above_the_progress_bar(terminal):
    console, stream = terminal
    with ProgressBars(console).track("transfer", total=4) as tracker:
        tracker.advance()
        log.info("checkpoint stored")
        tracker.advance()
    assert "[info] checkpoint stored\n" in stream.getvalue()
