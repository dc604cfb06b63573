"""Suppression of TensorFlow's startup messages."""

import subprocess
import sys

SCRIPT = """
import os
from topwork.cli.runtime.tensorflow_import import suppress_stderr
with suppress_stderr():
    os.write(2, b"startup message\\n")
    {statement}
os.write(2, b"after\\n")
"""


def run_suppressed(statement: str, *, check: bool = True) -> "subprocess.CompletedProcess[str]":
    script = SCRIPT.format(statement=statement)
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=check, timeout=60)


def test_startup_messages_are_suppressed():
    assert run_suppressed("").stderr == "after\n"


def test_startup_messages_are_printed_if_the_import_fails():
    completed = run_suppressed("raise ValueError('no library')", check=False)
    assert completed.stderr.startswith("startup message\n")
    assert "ValueError: no library" in completed.stderr


def test_long_startup_messages_do_not_block():
    assert run_suppressed("[os.write(2, b'x' * 1000) for _ in range(60)]").returncode == 0
