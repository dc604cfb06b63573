"""Containers with failing storage or a full scratch volume: exit code, termination message and log line."""

import pytest
from tests.faults.proxy import Fault, error, run_proxy

EXPIRED = Fault("expired credentials", error(400, "ExpiredToken", "The provided token has expired."))
BUSY = Fault("503 SlowDown", error(503, "SlowDown", "Please reduce your request rate."))


@pytest.mark.parametrize(
    ("fault", "code", "expected"),
    [
        (EXPIRED, 75, "reports an expired session (ExpiredToken). Check AWS_SESSION_TOKEN, or log in again."),
        (BUSY, 75, "after all retries (SlowDown: Please reduce your request rate.). Try again later."),
    ],
)
def test_storage_fault_exits_with_its_code_and_one_error_line(pod, write_job, s3_settings, fault, code, expected):
    with run_proxy(s3_settings.endpoint_url) as proxy:
        proxy.set_fault(fault)
        exit_code, message, container = pod.run("pull", write_job(), AWS_ENDPOINT_URL=proxy.endpoint)
    assert (exit_code, message.exit_code, message.outcome) == (code, code, "failed")
    assert expected in message.error
    assert [line["message"] for line in container.lines if line["level"] == "error"] == [message.error]


def test_full_scratch_is_reported_and_retryable(pod, write_job, mount_disk):
    disk = pod.scratch = mount_disk(200 << 10)
    code, message, container = pod.run("pull", write_job())
    assert code == message.exit_code == 75
    assert f"but {disk}/tiny-" in message.error
    assert " free. Free space there, or use a larger disk or another node, then start again." in message.error
    assert "Traceback" not in container.output
