"""Processes that start with TensorFlow imported behave like new interpreters."""

import os
import signal
import subprocess
import sys

import pytest

DESCRIBE = """
import json, os, sys
state = {"arguments": sys.argv, "path": sys.path[0], "directory": os.getcwd(), "environment": dict(os.environ)}
state |= {"input": sys.stdin.read(), "main": __name__, "is_main": sys.modules["__main__"].__dict__ is globals()}
print(json.dumps(state))
print("to stderr", file=sys.stderr)
sys.exit(7)
"""


def test_process_has_the_arguments_environment_output_and_exit_code_of_a_new_interpreter(preloaded_python, tmp_path):
    environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"], "LC_CTYPE": "C.UTF-8"}
    if "PYTHONPATH" in os.environ:
        environment["PYTHONPATH"] = os.environ["PYTHONPATH"]
    arguments = ["-c", DESCRIBE, "one", "two"]
    process = preloaded_python.run(arguments, env=environment, cwd=tmp_path)
    expected = subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (process.returncode, process.stdout, process.stderr) == (7, expected.stdout, expected.stderr)


def test_tensorflow_is_imported_and_runs_operations_in_each_process(preloaded_python):
    code = "import sys\nassert 'tensorflow' in sys.modules\nimport tensorflow as tf\nprint(int(tf.reduce_sum([1, 2])))"
    assert [preloaded_python.run(["-c", code]).stdout for _ in range(2)] == ["3\n", "3\n"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_process_ends_at_a_signal(preloaded_python, tmp_path, number):
    with (tmp_path / "log").open("w") as log:
        process = preloaded_python.start(
            ["-c", "print('ready', flush=True)\nimport time\ntime.sleep(60)"], stdout=log, stderr=log
        )
        while not (tmp_path / "log").read_text():
            assert process.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0.1)
        process.send_signal(number)
        assert process.wait(timeout=30) == process.poll() == -number


def test_variables_that_change_the_imports_require_a_new_interpreter(preloaded_python):
    assert preloaded_python.accepts(dict(os.environ))
    assert not preloaded_python.accepts({**os.environ, "PYTHONPATH": "/elsewhere"})


def test_export_check_of_a_process_is_a_process_with_tensorflow_imported(preloaded_python):
    code = """
import subprocess
from topwork.report.export_check import COMMAND
check = "import os, sys; print('tensorflow' in sys.modules, sys.stdin.read(), sys.argv, os.getcwd()); sys.exit(3)"
command = [*COMMAND[:COMMAND.index("-m")], "-c", check, "one"]
result = subprocess.run(command, input="request", capture_output=True, text=True, cwd="/")
print(result.returncode, result.stdout, result.stderr)
"""
    assert preloaded_python.run(["-c", code]).stdout == "3 True request ['-c', 'one'] /\n \n"


def test_process_is_killed_with_the_program_that_waits_for_it(preloaded_python, tmp_path):
    code = f"""
import subprocess
from topwork.report.export_check import COMMAND
check = "import time; print('started', flush=True); time.sleep(2); open({str(tmp_path / "survived")!r}, 'w')"
command = [*COMMAND[:COMMAND.index("-m")], "-c", check]
process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
print(process.stdout.readline())
process.kill()
process.communicate()  # until the process has closed its standard output
"""
    assert preloaded_python.run(["-c", code], timeout=30).stdout == "started\n\n"
    assert not (tmp_path / "survived").exists()
