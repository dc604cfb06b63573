"""Failures in a cluster: the exit code and error message of each."""

import json

import pytest
from tests.cluster.environment import DELETION_SECONDS, EVENT_SECONDS, RUN_SECONDS, START_SECONDS
from tests.cluster.kubectl import Kubectl, wait_for
from tests.cluster.manifests import CLOSED_ENDPOINT
from tests.cluster.runs import Run

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(2 * RUN_SECONDS)]

LONG_TRAINING = {"train": "all", "epochs": 10_000, "batchSize": 8, "featureCache": "off"}


def assert_failed_without_retry(run: Run, code: int) -> None:
    """Assert that the FailJob rule of the Job failed it after a single pod."""
    failed = run.condition("Failed")
    assert failed["reason"] == "PodFailurePolicy"
    assert f"exit code {code}" in failed["message"]
    assert len(run.pods()) == 1


def cancel(run: Run, topwork, **options: str) -> None:
    """Cancel a run that can never start."""
    canceled = topwork("cancel", run.name, "--now", seconds=DELETION_SECONDS, **options)
    assert canceled.exit_code == 0, canceled.output


@pytest.mark.smoke
def test_missing_secret_fails_without_retry_and_is_named(make_run, make_namespace, topwork):
    empty = make_namespace()
    run = make_run(namespace=empty)
    result = topwork("submit", run.file, "--follow", namespace=empty.namespace)
    assert result.exit_code == 2, result.output
    assert "topwork-s3" in result.output
    assert "Traceback" not in result.output
    assert_failed_without_retry(run, 2)


def test_wrong_credentials_are_retried_up_to_the_backoff_limit_and_not_printed(
    make_run, make_namespace, topwork, pod_storage
):
    other = make_namespace(pod_storage, AWS_SECRET_ACCESS_KEY="not-the-secret-key")
    run = make_run(namespace=other, compute={"retries": 1})
    result = topwork("submit", run.file, "--follow", namespace=other.namespace)
    assert result.exit_code == 75, result.output
    assert "AWS_SECRET_ACCESS_KEY" in result.output
    assert "not-the-secret-key" not in result.output
    assert run.condition("Failed")["reason"] == "BackoffLimitExceeded"
    assert len(run.pods()) == 2


def test_unreachable_endpoint_is_retried_up_to_the_backoff_limit(make_run, make_namespace, topwork, pod_storage):
    variables = {"AWS_ENDPOINT_URL": CLOSED_ENDPOINT, "AWS_ENDPOINT_URL_S3": CLOSED_ENDPOINT}
    other = make_namespace(pod_storage, **variables)
    run = make_run(namespace=other, compute={"retries": 1})
    result = topwork("submit", run.file, "--follow", namespace=other.namespace)
    assert result.exit_code == 75, result.output
    assert CLOSED_ENDPOINT in result.output
    assert run.condition("Failed")["reason"] == "BackoffLimitExceeded"
    assert len(run.pods()) == 2


def test_unmet_gate_exits_with_3(make_run, topwork):
    gate = {"metric": "calibrationError", "atMost": 0.0}
    run = make_run(evaluate={"metrics": ["calibrationError"], "gates": [gate]})
    result = topwork("submit", run.file, "--follow")
    assert result.exit_code == 3, result.output
    assert "calibrationError" in result.output
    assert_failed_without_retry(run, 3)
    status = topwork("status", run.name)
    assert "calibrationError" in status.output
    assert topwork("logs", run.name).exit_code == 0


def quota(hard: dict[str, str]) -> dict[str, object]:
    return {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "tight"}, "spec": {"hard": hard}}


def wait_for_quota(kubectl: Kubectl) -> None:
    """Wait until the quota controller has computed the usage. Until then, the result of admission is undefined."""

    def used() -> object:
        stored = kubectl.get("resourcequota", "tight")
        return stored and stored.get("status", {}).get("used")

    wait_for(used, "usage of the quota", seconds=60)


def test_quota_exceeded_by_the_pod_is_explained(make_run, make_namespace, topwork, pod_storage):
    other = make_namespace(pod_storage)
    other.apply(quota({"requests.cpu": "10m"}))
    wait_for_quota(other)
    run = make_run(namespace=other)
    followed = topwork.start("submit", run.file, "--follow", namespace=other.namespace)
    followed.wait_for("quota tight", "requests.cpu", seconds=EVENT_SECONDS)
    cancel(run, topwork, namespace=other.namespace)
    assert followed.wait(seconds=DELETION_SECONDS).exit_code == 143


def test_quota_exceeded_by_the_job_rejects_the_submission(make_run, make_namespace, topwork, pod_storage):
    other = make_namespace(pod_storage)
    other.apply(quota({"count/jobs.batch": "0"}))
    wait_for_quota(other)
    run = make_run(namespace=other)
    rejected = topwork("submit", run.file, namespace=other.namespace)
    assert rejected.exit_code == 2, rejected.output
    assert "quota" in rejected.output
    assert "Traceback" not in rejected.output
    assert run.kubernetes_job() is None


def test_pod_security_violation_is_explained(make_run, topwork, namespace):
    run = make_run()
    rendered = topwork("render", run.file, "-o", "json")
    assert rendered.exit_code == 0, rendered.output
    objects = json.loads(rendered.stdout)["items"]
    job = next(obj for obj in objects if obj["kind"] == "Job")
    # The renderer never sets this; a webhook or a user may.
    job["spec"]["template"]["spec"]["containers"][0]["securityContext"]["allowPrivilegeEscalation"] = True
    namespace.apply(*objects)
    followed = topwork.start("status", run.name, "--follow")
    followed.wait_for("Pod Security", "restricted", "allowPrivilegeEscalation", seconds=EVENT_SECONDS)
    cancel(run, topwork)
    assert followed.wait(seconds=DELETION_SECONDS).exit_code == 143


def test_failed_image_pull_is_explained(make_run, topwork):
    run = make_run()
    # The domain .invalid is reserved (RFC 2606), so this registry can never exist.
    image = "registry.invalid/topwork:none"
    followed = topwork.start("submit", run.file, "--follow", "--image", image)
    followed.wait_for(f"the image {image} can't be pulled", seconds=START_SECONDS)
    cancel(run, topwork)
    assert followed.wait(seconds=DELETION_SECONDS).exit_code == 143


def test_exceeded_deadline_exits_with_75(make_run, topwork, pod_storage):
    run = make_run(transfer=LONG_TRAINING, compute={"deadlineSeconds": 120})
    result = topwork("submit", run.file, "--follow", seconds=START_SECONDS + DELETION_SECONDS)
    assert result.exit_code == 75, result.output
    assert "deadlineSeconds" in result.output
    assert run.condition("Failed")["reason"] == "DeadlineExceeded"


def test_insufficient_gpus_are_explained_until_the_deadline(make_run, topwork):
    transfer = {"train": "all", "epochs": 2, "batchSize": 16, "featureCache": "off"}
    run = make_run(transfer=transfer, compute={"gpus": 16, "deadlineSeconds": 90})
    result = topwork("submit", run.file, "--follow")
    assert result.exit_code == 75, result.output
    assert "nvidia.com/gpu" in result.output
    assert "deadlineSeconds" in result.output


def test_missing_namespace_is_reported_with_the_command_to_create_it(make_run, topwork):
    run = make_run()
    rejected = topwork("submit", run.file, namespace="topwork-test-missing")
    assert rejected.exit_code == 2, rejected.output
    assert "kubectl create namespace topwork-test-missing" in rejected.output
    assert "Traceback" not in rejected.output


@pytest.mark.smoke
def test_unknown_run_is_named(topwork):
    for command in ("status", "logs"):
        rejected = topwork(command, "never-submitted")
        assert rejected.exit_code == 2, rejected.output
        assert "never-submitted" in rejected.output
        assert "Traceback" not in rejected.output
