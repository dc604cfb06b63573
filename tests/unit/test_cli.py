"""The command line as a whole: what it says of itself, and of what is missing."""

import subprocess
import sys


def call(script: str) -> "subprocess.CompletedProcess[str]":
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
    ended = call(script)
    assert ended.returncode == 0, ended.stderr
    assert all(f"\n  {name} " in ended.stdout for name in ended.stdout.splitlines()[-1].split())


def test_a_library_of_an_extra_that_is_missing_is_named_with_the_extra():
    script = (
        "import sys\n"
        "sys.modules['numpy'] = None\n"
        "from topwork.cli import main\n"
        "sys.argv = ['topwork', 'run', 'examples/solar-base.yaml']\n"
        "main()"
    )
    ended = call(script)
    assert ended.returncode == 2
    assert ended.stderr == (
        "topwork: numpy is not installed. To train and predict, install topwork[cpu] or topwork[gpu]; for the embedded "
        "S3 server, topwork[local].\n"
    )


def test_a_command_that_is_none_is_an_error_of_usage():
    ended = call("import sys; sys.argv = ['topwork', 'trane']; from topwork.cli import main; main()")
    assert ended.returncode == 2
    assert "No such command 'trane'" in ended.stderr
