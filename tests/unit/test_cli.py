"""The command line as a whole: help, global options, missing libraries and unknown commands."""

import subprocess
import sys


def run_python(script: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)


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


def test_missing_library_error_names_its_extra():
    script = (
        "import sys\n"
        "sys.modules['numpy'] = None\n"
        "from topwork.cli import main\n"
        "sys.argv = ['topwork', 'run', 'examples/solar-base.yaml']\n"
        "main()"
    )
    result = run_python(script)
    assert result.returncode == 2
    assert result.stderr == (
        "topwork: numpy is not installed. To train and predict, install topwork[cpu] or topwork[gpu]; for the embedded "
        "S3 server, topwork[local].\n"
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
