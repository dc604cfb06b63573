"""`topwork validate`, as a user calls it."""

import subprocess
import sys
from pathlib import Path

import pytest

from topwork.cli.commands.spec import validate
from topwork.errors import SpecError
from topwork.spec.loading.loader import read_jobs

GOOD = Path(__file__).with_name("test_spec_good.yaml")


def test_validate_names_each_job_and_its_run(capsys: pytest.CaptureFixture[str]) -> None:
    (job,) = read_jobs(GOOD)
    validate([GOOD, GOOD])
    line = f"{GOOD}: TransferJob cats-vs-dogs ok (run {job.run})\n"
    assert capsys.readouterr() == (line * 2, "")


def test_validate_refuses_with_all_problems_and_prints_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(GOOD.read_text().replace("gpus: 2", "gpus: 99"))
    with pytest.raises(SpecError) as caught:
        validate([GOOD, wrong, tmp_path / "none.yaml"])
    assert str(caught.value) == (
        f"{wrong}:44:11: spec.compute.gpus: 99 is not allowed. Allowed: a whole number from 0 to 16.\n"
        f"{tmp_path}/none.yaml: is not there. Check the path."
    )
    assert capsys.readouterr().out == ""


def test_validate_reads_standard_input_and_exits_2_without_a_traceback() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "topwork", "validate", "-"], input=b"\xff\0", capture_output=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, b"")
    assert b"standard input:1:1: the byte 0xff is no UTF-8." in done.stderr
    assert b"Traceback" not in done.stderr


def test_validate_loads_no_tensorflow() -> None:
    script = "import sys, topwork.cli.commands.spec; print(sorted({'tensorflow', 'keras'} & {*sys.modules}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, text=True)
    assert done.stdout == "[]\n"
