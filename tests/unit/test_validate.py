"""The `topwork validate` command."""

import subprocess
import sys
from pathlib import Path

import pytest

from topwork.cli.commands.spec import validate
from topwork.errors import SpecError
from topwork.spec.loading.loader import read_jobs

VALID = Path(__file__).with_name("valid_spec.yaml")


def test_validate_prints_each_job_and_its_digest(capsys: pytest.CaptureFixture[str]) -> None:
    (job,) = read_jobs(VALID)
    validate([VALID, VALID])
    line = f"{VALID}: TransferJob cats-vs-dogs ok (digest {job.digest[:8]})\n"
    assert capsys.readouterr() == (line * 2, "")


def test_validate_reports_all_problems_and_prints_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    invalid = tmp_path / "invalid.yaml"
    invalid.write_text(VALID.read_text().replace("gpus: 2", "gpus: 99"))
    with pytest.raises(SpecError) as caught:
        validate([VALID, invalid, tmp_path / "none.yaml"])
    assert str(caught.value) == (
        f"{invalid}:44:11: spec.compute.gpus: 99 is not allowed. Allowed: an integer from 0 to 16.\n"
        f"{tmp_path}/none.yaml: does not exist. Check the path."
    )
    assert capsys.readouterr().out == ""


def test_validate_reads_standard_input_and_exits_2_without_a_traceback() -> None:
    completed = subprocess.run(
        [sys.executable, "-m", "topwork", "validate", "-"], input=b"\xff\0", capture_output=True, check=False
    )
    assert (completed.returncode, completed.stdout) == (2, b"")
    assert b"standard input:1:1: byte 0xff is not valid UTF-8." in completed.stderr
    assert b"Traceback" not in completed.stderr


# Each takes a large part of the time of `topwork validate`, or is not installed where only specs are checked.
HEAVY_MODULES = (
    *(
        "tensorflow",
        "keras",
        "numpy",
        "scipy",
        "sklearn",
        "pandas",
        "matplotlib",
        "PIL",
        "jinja2",
        "tensorflow_datasets",
    ),
    *("boto3", "botocore", "kubernetes", "prometheus_client", "requests", "urllib3"),
)


def test_validate_works_and_does_not_try_to_import_heavy_modules() -> None:
    script = (
        "import sys\n"
        f"sys.argv = ['topwork', 'validate', {str(VALID)!r}]\n"
        "from topwork.cli import main\n"
        "try: main()\n"
        f"finally: print([name for name in {HEAVY_MODULES} if name in sys.modules])"
    )
    completed = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False, text=True)
    assert (completed.returncode, completed.stderr) == (0, "")
    first, last = completed.stdout.splitlines()
    assert (" ok (digest " in first, last) == (True, "[]")
