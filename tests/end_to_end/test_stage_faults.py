"""Containers whose storage or scratch fails: exit code, termination message and one line in the log."""

import subprocess

import pytest
from tests.faults.proxy import Fault, error, run_proxy

EXPIRED = Fault("expired credentials", error(400, "ExpiredToken", "The provided token has expired."))
BUSY = Fault("503 SlowDown", error(503, "SlowDown", "Please reduce your request rate."))


@pytest.mark.parametrize(
    ("fault", "code", "said"),
    [
        (EXPIRED, 2, "reports an expired session (ExpiredToken). Check AWS_SESSION_TOKEN, or log in again."),
        (BUSY, 75, "after all retries (SlowDown: Please reduce your request rate.). Try again later."),
    ],
)
def test_a_fault_of_storage_ends_a_container_with_its_code_and_one_sentence(pod, write, s3_settings, fault, code, said):
    with run_proxy(s3_settings.endpoint_url) as proxy:
        proxy.set_fault(fault)
        ended, ending, process = pod.run("pull", write(), AWS_ENDPOINT_URL=proxy.endpoint)
    assert (ended, ending.exit_code, ending.outcome) == (code, code, "failed")
    assert said in ending.error
    assert [line["message"] for line in process.lines if line.get("level") == "error"] == [ending.error]


def test_scratch_that_is_full_is_named_and_worth_another_node(pod, write, tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(place)]
    if subprocess.run(mounting, capture_output=True, check=False).returncode:
        pytest.skip("mounts a small disk: run as root (in a container with --cap-add SYS_ADMIN)")
    try:
        pod.scratch = place
        code, ending, process = pod.run("pull", write())
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)
    assert code == ending.exit_code == 75
    assert f"but {place}/tiny-" in ending.error
    assert " free. Free space there, or use a larger disk or another node, then start again." in ending.error
    assert "Traceback" not in process.output
