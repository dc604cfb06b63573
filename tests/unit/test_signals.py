"""Signal handling: SIGTERM and SIGINT in separate processes."""

import signal
import subprocess
import sys

import pytest

SCRIPT = """
import os, signal, sys, time, weakref
from topwork.cancellation import StopRequest
from topwork.cli.runtime.signals import start_stop_watchdog, stop_on_signals
from topwork.errors import Stopped

def ready():
    print("ready", flush=True)


stop = StopRequest()
try:
    with stop_on_signals(stop, ignore_repeats={ignore_repeats}):
        start_stop_watchdog(stop, {seconds}, lambda: os._exit(7), grace_seconds={grace})
        {work}
except Stopped as error:
    sys.exit(error.exit_code)
"""


def run_until_signals(
    work: str, *numbers: int, ignore_repeats: bool = False, seconds: float = 30, grace: float | None = None
) -> tuple[int, str]:
    """Start a process, send signals once its work is ready, and return its exit code and all further output."""
    script = SCRIPT.format(
        work=work.replace("\n", "\n        "), ignore_repeats=ignore_repeats, seconds=seconds, grace=grace
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout.readline() == "ready\n"
        for number in numbers:
            process.send_signal(number)
        output = process.stdout.read()
        return process.wait(timeout=30), output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_interrupts_the_work_immediately(number):
    assert run_until_signals("ready()\ntime.sleep(60)", number) == (143, "")


def test_work_that_swallows_the_interrupt_is_terminated_by_the_watchdog():
    work = (
        "try:\n    ready()\n    time.sleep(60)\nexcept BaseException:\n    print('swallowed', flush=True)\n"
        "while True:\n    time.sleep(60)"
    )
    assert run_until_signals(work, signal.SIGTERM, seconds=0.3) == (7, "swallowed\n")


def test_native_code_that_replaces_the_interrupt_is_stopped():
    # pybind11, if the signal arrives while it creates another exception.
    message = "MISMATCH: ORIGINAL InvalidArgumentError REPLACED BY {type(error).__name__}"
    work = (
        "try:\n    ready()\n    time.sleep(60)\nexcept BaseException as error:\n"
        f"    raise RuntimeError(f'{message}') from None"
    )
    assert run_until_signals(work, signal.SIGTERM) == (143, "")


def test_other_errors_after_a_signal_are_reported():
    work = (
        "with stop.deferred():\n    ready()\n    while not stop.is_set(): time.sleep(0.01)\n"
        "    raise RuntimeError('of the work')"
    )
    code, output = run_until_signals(work, signal.SIGTERM)
    assert code == 1
    assert output.endswith("RuntimeError: of the work\n")


def test_work_that_defers_the_request_may_exceed_the_watchdog_timeout():
    work = "with stop.deferred():\n    ready()\n    time.sleep(3.5)\n    print('stored', stop.is_set(), flush=True)"
    assert run_until_signals(work, signal.SIGTERM, seconds=2) == (143, "stored True\n")


def test_second_signal_has_its_default_effect():
    work = (
        "with stop.deferred():\n    os.kill(os.getpid(), 15)\n    while not stop.is_set(): time.sleep(0.01)\n"
        "    ready()\n    time.sleep(60)"
    )
    assert run_until_signals(work, signal.SIGTERM) == (-signal.SIGTERM, "")


def test_second_signal_is_ignored_if_repeats_are_ignored():
    work = (
        "with stop.deferred():\n    os.kill(os.getpid(), 15)\n    while not stop.is_set(): time.sleep(0.01)\n"
        "    ready()\n    time.sleep(1)\n    print('stored', flush=True)"
    )
    result = run_until_signals(work, signal.SIGTERM, signal.SIGINT, ignore_repeats=True, grace=60)
    assert result == (143, "stored\n")


def test_work_that_defers_the_request_is_terminated_before_the_grace_period_expires():
    # 5 seconds of the grace period are reserved for the shutdown.
    work = "with stop.deferred():\n    ready()\n    time.sleep(60)"
    assert run_until_signals(work, signal.SIGTERM, ignore_repeats=True, grace=6) == (7, "")


def test_interrupt_that_native_code_swallows_is_repeated():
    work = (
        "try:\n    ready()\n    time.sleep(60)\nexcept BaseException:\n    print('swallowed', flush=True)\n"
        "time.sleep(60)"
    )
    assert run_until_signals(work, signal.SIGTERM) == (143, "swallowed\n")


def test_interrupt_that_python_discards_is_repeated_without_output():
    """Python prints an exception of a callback and continues: in a container, that line would not be JSON."""
    work = (
        "target = StopRequest()\nref = weakref.ref(target, lambda _: (ready(), time.sleep(60)))\ndel target\n"
        "print('continued', flush=True)\ntime.sleep(60)"
    )
    assert run_until_signals(work, signal.SIGTERM) == (143, "continued\n")


def test_other_exceptions_that_python_discards_are_reported():
    work = (
        "target = StopRequest()\nref = weakref.ref(target, lambda _: 1 / 0)\n"
        "with stop.deferred():\n    ready()\n    del target\n    while not stop.is_set(): time.sleep(0.01)"
    )
    code, output = run_until_signals(work, signal.SIGTERM)
    assert (code, output.splitlines()[-1]) == (143, "ZeroDivisionError: division by zero")


def test_cleanup_after_an_interrupt_is_not_interrupted():
    work = "try:\n    ready()\n    time.sleep(60)\nfinally:\n    time.sleep(1.5)\n    print('clean', flush=True)"
    assert run_until_signals(work, signal.SIGTERM) == (143, "clean\n")


def test_cleanup_after_a_deferred_request_is_not_interrupted():
    work = (
        "try:\n    with stop.deferred():\n        ready()\n        while not stop.is_set(): time.sleep(0.01)\n"
        "finally:\n    time.sleep(1.5)\n    print('clean', flush=True)"
    )
    assert run_until_signals(work, signal.SIGTERM) == (143, "clean\n")
