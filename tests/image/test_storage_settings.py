"""Containers of the rendered Job with a wrong Secret or unreachable storage."""

import pytest
from tests.image.conftest import read_fixture_job

from topwork.cluster.termination_message import TerminationMessage

pytestmark = [pytest.mark.image, pytest.mark.timeout(1800)]

UNREACHABLE = "http://127.0.0.1:9"


@pytest.fixture
def pull(make_pod, solar):
    """Function that runs the pull container of the transfer example with a Secret; returns the job and final state."""

    def run(secret):
        job = read_fixture_job("solar-transfer")
        return job, make_pod(job, secret).start("pull").wait()

    return run


def failure_message(job, terminated):
    """Check the termination message of a failed container, and return its error."""
    assert "Traceback" not in terminated.log
    error = terminated.termination_message.error
    assert terminated.termination_message == TerminationMessage(
        stage="pull", outcome="failed", exit_code=terminated.exit_code, run=job.run, error=error
    )
    return error


def test_missing_secret_is_reported_with_exit_code_2(pull):
    job, terminated = pull({})
    assert terminated.exit_code == 2
    assert "topwork-s3" in failure_message(job, terminated)


def test_wrong_secret_key_is_reported_with_exit_code_75_and_not_logged(pull, secret):
    # A corrected Secret works without a new Job, so the pod is retried.
    job, terminated = pull(secret | {"AWS_SECRET_ACCESS_KEY": "not-the-secret-key"})
    assert terminated.exit_code == 75
    assert "AWS_SECRET_ACCESS_KEY" in failure_message(job, terminated)
    assert "not-the-secret-key" not in terminated.log


def test_unreachable_endpoint_is_reported_with_exit_code_75(pull, secret):
    job, terminated = pull(secret | {"AWS_ENDPOINT_URL": UNREACHABLE})
    assert terminated.exit_code == 75
    assert UNREACHABLE in failure_message(job, terminated)
