"""What goes wrong in a cluster: each failure with its exit code, and with a sentence that says what to do."""

import json

import pytest
from tests.cluster.environment import DELETION_SECONDS, EVENT_SECONDS, RUN_SECONDS, START_SECONDS
from tests.cluster.kubectl import Kubectl, wait_for
from tests.cluster.runs import Run

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(2 * RUN_SECONDS)]

LONG_TRAINING = {"train": "all", "epochs": 10_000, "batchSize": 8, "featureCache": "off"}
# Nothing listens there inside a pod.
CLOSED = "http://127.0.0.1:9"


def assert_failed_without_retry(run: Run, code: int) -> None:
    """The Job is over by its FailJob rule, after a single pod."""
    failed = run.condition("Failed")
    assert failed["reason"] == "PodFailurePolicy"
    assert f"exit code {code}" in failed["message"]
    assert len(run.pods()) == 1


def cancel(run: Run, topwork, **where: str) -> None:
    """Remove a run that will never start."""
    cancelled = topwork("cancel", run.name, "--now", seconds=DELETION_SECONDS, **where)
    assert cancelled.exit_code == 0, cancelled.output


def test_a_missing_secret_fails_at_once_and_is_named(make_run, make_namespace, topwork):
    bare = make_namespace()
    run = make_run(where=bare)
    ended = topwork("submit", run.file, "--follow", namespace=bare.namespace)
    assert ended.exit_code == 2, ended.output
    assert "topwork-s3" in ended.output
    assert "Traceback" not in ended.output
    assert_failed_without_retry(run, 2)


def test_wrong_credentials_fail_at_once_and_are_not_shown(make_run, make_namespace, topwork, pod_storage):
    other = make_namespace(pod_storage, AWS_SECRET_ACCESS_KEY="not-the-secret-of-anybody")
    run = make_run(where=other)
    ended = topwork("submit", run.file, "--follow", namespace=other.namespace)
    assert ended.exit_code == 2, ended.output
    assert "not-the-secret-of-anybody" not in ended.output
    assert_failed_without_retry(run, 2)


def test_an_endpoint_that_refuses_is_retried_until_the_limit(make_run, make_namespace, topwork, pod_storage):
    elsewhere = {"AWS_ENDPOINT_URL": CLOSED, "AWS_ENDPOINT_URL_S3": CLOSED}
    other = make_namespace(pod_storage, **elsewhere)
    run = make_run(where=other, compute={"retries": 1})
    ended = topwork("submit", run.file, "--follow", namespace=other.namespace)
    assert ended.exit_code == 75, ended.output
    assert CLOSED in ended.output
    assert run.condition("Failed")["reason"] == "BackoffLimitExceeded"
    assert len(run.pods()) == 2


def test_a_gate_that_is_not_met_ends_with_3(make_run, topwork):
    gate = {"metric": "calibrationError", "atMost": 0.0}
    run = make_run(evaluate={"metrics": ["calibrationError"], "gates": [gate]})
    ended = topwork("submit", run.file, "--follow")
    assert ended.exit_code == 3, ended.output
    assert "calibrationError" in ended.output
    assert_failed_without_retry(run, 3)
    status = topwork("status", run.name)
    assert "calibrationError" in status.output


def quota(hard: dict[str, str]) -> dict[str, object]:
    return {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "tight"}, "spec": {"hard": hard}}


def wait_for_quota(kubectl: Kubectl) -> None:
    """Until the quota controller has counted for the first time, everything or nothing may be let in."""

    def counted() -> object:
        found = kubectl.get("resourcequota", "tight")
        return found and found.get("status", {}).get("used")

    wait_for(counted, "the first count of the quota", seconds=60)


def test_a_quota_without_room_for_the_pod_is_told_in_words(make_run, make_namespace, topwork, pod_storage):
    other = make_namespace(pod_storage)
    other.apply(quota({"requests.cpu": "10m"}))
    wait_for_quota(other)
    run = make_run(where=other)
    followed = topwork.start("submit", run.file, "--follow", namespace=other.namespace)
    followed.wait_for("quota tight", "requests.cpu", seconds=EVENT_SECONDS)
    cancel(run, topwork, namespace=other.namespace)
    assert followed.wait(seconds=DELETION_SECONDS).exit_code == 143


def test_a_quota_without_room_for_the_job_refuses_the_submit(make_run, make_namespace, topwork, pod_storage):
    other = make_namespace(pod_storage)
    other.apply(quota({"count/jobs.batch": "0"}))
    wait_for_quota(other)
    run = make_run(where=other)
    refused = topwork("submit", run.file, namespace=other.namespace)
    assert refused.exit_code == 2, refused.output
    assert "quota" in refused.output
    assert "Traceback" not in refused.output
    assert run.kubernetes_job() is None


def test_pod_security_that_refuses_the_pod_is_told_in_words(make_run, topwork, namespace):
    run = make_run()
    rendered = topwork("render", run.file, "-o", "json")
    assert rendered.exit_code == 0, rendered.output
    objects = json.loads(rendered.stdout)["items"]
    job = next(each for each in objects if each["kind"] == "Job")
    # What the renderer never writes: somebody's webhook, or a hand, did it.
    job["spec"]["template"]["spec"]["containers"][0]["securityContext"]["allowPrivilegeEscalation"] = True
    namespace.apply(*objects)
    followed = topwork.start("status", run.name, "--follow")
    followed.wait_for("Pod Security", "restricted", "allowPrivilegeEscalation", seconds=EVENT_SECONDS)
    cancel(run, topwork)
    assert followed.wait(seconds=DELETION_SECONDS).exit_code == 143


def test_an_image_that_is_nowhere_is_told_in_words(make_run, topwork):
    run = make_run()
    # .invalid is reserved (RFC 2606): no registry is ever there.
    image = "registry.invalid/topwork:none"
    followed = topwork.start("submit", run.file, "--follow", "--image", image)
    followed.wait_for(f"the image {image} can't be pulled", seconds=START_SECONDS)
    cancel(run, topwork)
    assert followed.wait(seconds=DELETION_SECONDS).exit_code == 143


def test_the_deadline_ends_a_run_with_75_and_its_checkpoint(make_run, topwork, pod_storage):
    run = make_run(transfer=LONG_TRAINING, compute={"deadlineSeconds": 120})
    ended = topwork("submit", run.file, "--follow", seconds=START_SECONDS + DELETION_SECONDS)
    assert ended.exit_code == 75, ended.output
    assert "deadlineSeconds" in ended.output
    assert run.condition("Failed")["reason"] == "DeadlineExceeded"


def test_gpus_that_no_node_has_are_told_in_words_until_the_deadline(make_run, topwork):
    transfer = {"train": "all", "epochs": 2, "batchSize": 16, "featureCache": "off"}
    run = make_run(transfer=transfer, compute={"gpus": 16, "deadlineSeconds": 90})
    ended = topwork("submit", run.file, "--follow")
    assert ended.exit_code == 75, ended.output
    assert "nvidia.com/gpu" in ended.output
    assert "deadlineSeconds" in ended.output


def test_a_namespace_that_is_not_there_is_named_with_the_command_that_makes_it(make_run, topwork):
    run = make_run()
    refused = topwork("submit", run.file, namespace="topwork-test-nowhere")
    assert refused.exit_code == 2, refused.output
    assert "kubectl create namespace topwork-test-nowhere" in refused.output
    assert "Traceback" not in refused.output


def test_a_run_that_is_not_there_is_named(topwork):
    for command in ("status", "logs"):
        refused = topwork(command, "never-submitted")
        assert refused.exit_code == 2, refused.output
        assert "never-submitted" in refused.output
        assert "Traceback" not in refused.output
