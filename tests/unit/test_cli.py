"""The command line as a whole: help, global options, missing libraries and unknown commands."""

import os
import subprocess
import sys

from topwork.errors import limit_message, limit_traceback, quote_error


def run_python(script: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    environment = os.environ | variables
    return subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)


def test_help_names_every_command_without_training_libraries():
    script = (
        "import sys\n"
        "for name in ('numpy', 'tensorflow', 'keras', 'matplotlib', 'PIL', 'sklearn'): sys.modules[name] = None\n"
        "from topwork.cli import COMMANDS, main\n"
        "sys.argv = ['topwork', '--help']\n"
        "try: main()\n"
        "finally: print(*COMMANDS)"
    )
    result = run_python(script)
    assert result.returncode == 0, result.stderr
    assert all(f"\n  {name} " in result.stdout for name in result.stdout.splitlines()[-1].split())


def test_missing_library_error_names_its_extra(tmp_path):
    script = (
        "import sys\n"
        "sys.modules['numpy'] = None\n"
        "from topwork.cli import main\n"
        "sys.argv = ['topwork', 'run', 'examples/cats-vs-dogs.yaml']\n"
        "main()"
    )
    result = run_python(script, TOPWORK_STATE=str(tmp_path))
    assert result.returncode == 2
    assert result.stderr == (
        "topwork: numpy is not installed. To train and predict, install topwork[cpu] or topwork[gpu]; for searches, "
        "topwork[search]; for the embedded S3 server, topwork[local].\n"
    )


def test_unknown_command_is_a_usage_error():
    result = run_python("import sys; sys.argv = ['topwork', 'trane']; from topwork.cli import main; main()")
    assert result.returncode == 2
    assert "No such command 'trane'" in result.stderr


def test_verbose_option_logs_debug_messages():
    script = (
        "import sys\n"
        "from topwork.cli import main\n"
        "from topwork.cli.runtime.logging import is_verbose\n"
        "sys.argv = ['topwork', {options}'schema']\n"
        "try: main()\n"
        "finally: print(is_verbose())"
    )
    assert run_python(script.format(options="")).stdout.endswith("False\n")
    assert run_python(script.format(options="'--verbose', ")).stdout.endswith("True\n")


def test_messages_are_limited_to_a_screen():
    assert limit_message("short\nmessage") == "short\nmessage"
    long_line = limit_message("x" * 114_000)
    assert len(long_line) < 4100
    assert long_line.endswith("x… (110000 more characters)")
    lines = limit_message("\n".join(f"job.yaml:{number}: wrong" for number in range(500))).splitlines()
    assert (len(lines), lines[0], lines[-1]) == (40, "job.yaml:0: wrong", "… and 461 more lines")
    traceback = limit_traceback("Traceback:\n  File\nValueError: " + "x" * 114_000 + "\n")
    assert traceback.startswith("Traceback:\n  File\nValueError: xxx")
    assert len(traceback) < 4100


def test_error_of_a_library_is_quoted_on_one_short_line():
    assert quote_error(ValueError("bad shape\nwhole config")) == "bad shape"
    assert quote_error(KeyError()) == "KeyError"
    assert quote_error(ValueError("wide   gap " + "x" * 114_000)) == "wide gap " + "x" * 190 + "…"
