"""SIGTERM, in processes of their own."""

import signal
import subprocess
import sys

import pytest

STOPPED_WHERE = """
import os, signal, sys, time
from topwork.cli.signals import end_overdue, stopped_by_signals
from topwork.errors import Stopped
from topwork.stopping import StopSignal

stop = StopSignal()
try:
    with stopped_by_signals(stop):
        end_overdue(stop, 0.3, lambda: os._exit(7))
        print("ready", flush=True)
        {work}
except Stopped as error:
    sys.exit(error.exit_code)
"""


def ended(work: str, *numbers: int) -> tuple[int, str]:
    """Send signals to a process that does some work, and say how it ended and what it said meanwhile."""
    script = STOPPED_WHERE.format(work=work.replace("\n", "\n        "))
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        for number in numbers:
            process.send_signal(number)
        said = process.stdout.read()
        return process.wait(timeout=30), said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_work_where_it_is(number):
    assert ended("time.sleep(60)", number) == (143, "")


def test_work_that_swallows_the_wish_is_ended_when_its_time_is_over():
    work = "while True:\n    try: time.sleep(60)\n    except BaseException: print('swallowed', flush=True)"
    assert ended(work, signal.SIGTERM) == (7, "swallowed\n")


def test_work_that_holds_the_wish_off_has_all_the_time_it_needs():
    work = "with stop.held():\n    time.sleep(1.5)\n    print('stored', stop.is_set(), flush=True)"
    assert ended(work, signal.SIGTERM) == (143, "stored True\n")


def test_a_second_signal_ends_the_process_as_it_would_without():
    work = "with stop.held():\n    os.kill(os.getpid(), 15)\n    time.sleep(60)"
    assert ended(work, signal.SIGTERM) == (-signal.SIGTERM, "")
