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

def ready():
    print("ready", flush=True)


stop = StopSignal()
try:
    with stopped_by_signals(stop):
        end_overdue(stop, 0.3, lambda: os._exit(7))
        {work}
except Stopped as error:
    sys.exit(error.exit_code)
"""


def ended(work: str, *numbers: int) -> tuple[int, str]:
    """Send signals to a process once its work is ready, and say how it ended and what it said from then on."""
    script = STOPPED_WHERE.format(work=work.replace("\n", "\n        "))
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        for number in numbers:
            process.send_signal(number)
        said = process.stdout.read()
        return process.wait(timeout=30), said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_work_where_it_is(number):
    assert ended("ready()\ntime.sleep(60)", number) == (143, "")


def test_work_that_swallows_the_wish_is_ended_when_its_time_is_over():
    work = (
        "try:\n    ready()\n    time.sleep(60)\nexcept BaseException:\n    print('swallowed', flush=True)\n"
        "while True:\n    time.sleep(60)"
    )
    assert ended(work, signal.SIGTERM) == (7, "swallowed\n")


def test_work_that_holds_the_wish_off_has_all_the_time_it_needs():
    work = "with stop.held():\n    ready()\n    time.sleep(1.5)\n    print('stored', stop.is_set(), flush=True)"
    assert ended(work, signal.SIGTERM) == (143, "stored True\n")


def test_a_second_signal_ends_the_process_as_it_would_without():
    work = (
        "with stop.held():\n    os.kill(os.getpid(), 15)\n    while not stop.is_set(): time.sleep(0.01)\n"
        "    ready()\n    time.sleep(60)"
    )
    assert ended(work, signal.SIGTERM) == (-signal.SIGTERM, "")
