"""SIGTERM, in processes of their own."""

import signal
import subprocess
import sys

import pytest

STOPPED_WHERE = """
import os, signal, sys, time, weakref
from topwork.cli.runtime.signals import end_overdue, stopped_by_signals
from topwork.errors import Stopped
from topwork.cancellation import StopSignal

def ready():
    print("ready", flush=True)


stop = StopSignal()
try:
    with stopped_by_signals(stop, patient={patient}):
        end_overdue(stop, {seconds}, lambda: os._exit(7), grace_seconds={grace})
        {work}
except Stopped as error:
    sys.exit(error.exit_code)
"""


def ended(work: str, *numbers: int, patient=False, seconds=30, grace=None) -> tuple[int, str]:
    """Send signals to a process once its work is ready, and say how it ended and what it said from then on."""
    work = work.replace("\n", "\n        ")
    script = STOPPED_WHERE.format(work=work, patient=patient, seconds=seconds, grace=grace)
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
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
    assert ended(work, signal.SIGTERM, seconds=0.3) == (7, "swallowed\n")


def test_work_that_holds_the_wish_off_has_all_the_time_it_needs():
    work = "with stop.held():\n    ready()\n    time.sleep(3.5)\n    print('stored', stop.is_set(), flush=True)"
    assert ended(work, signal.SIGTERM, seconds=2) == (143, "stored True\n")


def test_a_second_signal_ends_the_process_as_it_would_without():
    work = (
        "with stop.held():\n    os.kill(os.getpid(), 15)\n    while not stop.is_set(): time.sleep(0.01)\n"
        "    ready()\n    time.sleep(60)"
    )
    assert ended(work, signal.SIGTERM) == (-signal.SIGTERM, "")


def test_a_patient_process_goes_on_storing_when_it_is_asked_again():
    work = (
        "with stop.held():\n    os.kill(os.getpid(), 15)\n    while not stop.is_set(): time.sleep(0.01)\n"
        "    ready()\n    time.sleep(1)\n    print('stored', flush=True)"
    )
    assert ended(work, signal.SIGTERM, signal.SIGINT, patient=True, grace=60) == (143, "stored\n")


def test_work_that_holds_the_wish_off_is_ended_before_its_grace_period_is_over():
    # 5 seconds of it are kept for the end.
    work = "with stop.held():\n    ready()\n    time.sleep(60)"
    assert ended(work, signal.SIGTERM, patient=True, grace=6) == (7, "")


def test_a_wish_that_native_code_swallows_is_asked_again():
    work = (
        "try:\n    ready()\n    time.sleep(60)\nexcept BaseException:\n    print('swallowed', flush=True)\n"
        "time.sleep(60)"
    )
    assert ended(work, signal.SIGTERM) == (143, "swallowed\n")


def test_a_wish_that_python_drops_is_asked_again_without_a_word():
    """Python prints what is raised in a callback, and goes on: that would be no line of JSON."""
    work = (
        "gone = StopSignal()\nseen = weakref.ref(gone, lambda _: (ready(), time.sleep(60)))\ndel gone\n"
        "print('went on', flush=True)\ntime.sleep(60)"
    )
    assert ended(work, signal.SIGTERM) == (143, "went on\n")


def test_what_else_python_drops_is_told():
    work = (
        "gone = StopSignal()\nseen = weakref.ref(gone, lambda _: 1 / 0)\n"
        "with stop.held():\n    ready()\n    del gone\n    while not stop.is_set(): time.sleep(0.01)"
    )
    code, said = ended(work, signal.SIGTERM)
    assert (code, said.splitlines()[-1]) == (143, "ZeroDivisionError: division by zero")


def test_nothing_interrupts_the_cleaning_up_of_a_wish_that_is_heard():
    work = "try:\n    ready()\n    time.sleep(60)\nfinally:\n    time.sleep(1.5)\n    print('clean', flush=True)"
    assert ended(work, signal.SIGTERM) == (143, "clean\n")


def test_nothing_interrupts_the_cleaning_up_after_training_either():
    work = (
        "try:\n    with stop.held():\n        ready()\n        while not stop.is_set(): time.sleep(0.01)\n"
        "finally:\n    time.sleep(1.5)\n    print('clean', flush=True)"
    )
    assert ended(work, signal.SIGTERM) == (143, "clean\n")
