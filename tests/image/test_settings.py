"""What a wrong Secret or an unreachable storage comes to in a container of the rendered Job."""

import pytest
from tests.image.conftest import example

from topwork.cluster.termination_message import TerminationMessage

pytestmark = [pytest.mark.image, pytest.mark.timeout(1800)]

NOWHERE = "http://127.0.0.1:9"


@pytest.fixture
def pull(make_pod, solar):
    """Run the first container of the transfer example with other values in the Secret; gives its job and its end."""

    def run(secret):
        job = example("solar-transfer")
        return job, make_pod(job, secret).start("pull").wait()

    return run


def failure(job, ended):
    """How the container ended, with its reason beside it; that must be a sentence and hold no key."""
    assert "Traceback" not in ended.log
    error = ended.ending.error
    assert ended.ending == TerminationMessage(stage="pull", outcome="failed", exit_code=ended.exit_code, run=job.run, error=error)
    return error


def test_without_the_secret_the_container_ends_with_2_and_names_it(pull):
    job, ended = pull({})
    assert ended.exit_code == 2
    assert "topwork-s3" in failure(job, ended)


def test_a_wrong_secret_key_ends_the_container_with_2_and_is_not_repeated(pull, secret):
    job, ended = pull(secret | {"AWS_SECRET_ACCESS_KEY": "not-the-secret-key"})
    assert ended.exit_code == 2
    assert "AWS_SECRET_ACCESS_KEY" in failure(job, ended)
    assert "not-the-secret-key" not in ended.log


def test_an_unreachable_endpoint_ends_the_container_with_75_and_is_named(pull, secret):
    job, ended = pull(secret | {"AWS_ENDPOINT_URL": NOWHERE})
    assert ended.exit_code == 75
    assert NOWHERE in failure(job, ended)
