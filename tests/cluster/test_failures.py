"""What goes wrong in a cluster: each failure with its exit code, and with a sentence that says what to do."""

import json

import pytest
from tests.cluster.kubectl import Kubectl, eventually
from tests.cluster.runs import Run
from tests.cluster.surroundings import GONE_SECONDS, NOTICE_SECONDS, RUN_SECONDS, START_SECONDS

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(2 * RUN_SECONDS)]

LONG = {"train": "all", "epochs": 10_000, "batchSize": 8, "featureCache": "off"}
# Nothing listens there inside a pod.
CLOSED = "http://127.0.0.1:9"


def assert_failed_at_once(run: Run, code: int) -> None:
    """The Job is over by its FailJob rule, after a single pod."""
    failed = run.condition("Failed")
    assert failed["reason"] == "PodFailurePolicy"
    assert f"exit code {code}" in failed["message"]
    assert len(run.pods()) == 1


def cancel(run: Run, topwork, **where: str) -> None:
    """Remove a run that will never start."""
    cancelled = topwork("cancel", run.name, "--now", seconds=GONE_SECONDS, **where)
    assert cancelled.code == 0, cancelled.said


def test_a_missing_secret_fails_at_once_and_is_named(make_run, make_namespace, topwork):
    bare = make_namespace()
    run = make_run(where=bare)
    ended = topwork("submit", run.file, "--follow", namespace=bare.namespace)
    assert ended.code == 2, ended.said
    assert "topwork-s3" in ended.said
    assert "Traceback" not in ended.said
    assert_failed_at_once(run, 2)


def test_wrong_credentials_fail_at_once_and_are_not_shown(make_run, make_namespace, topwork, storage_of_pods):
    other = make_namespace(storage_of_pods, AWS_SECRET_ACCESS_KEY="not-the-secret-of-anybody")
    run = make_run(where=other)
    ended = topwork("submit", run.file, "--follow", namespace=other.namespace)
    assert ended.code == 2, ended.said
    assert "not-the-secret-of-anybody" not in ended.said
    assert_failed_at_once(run, 2)


def test_an_endpoint_that_refuses_is_retried_until_the_limit(make_run, make_namespace, topwork, storage_of_pods):
    elsewhere = {"AWS_ENDPOINT_URL": CLOSED, "AWS_ENDPOINT_URL_S3": CLOSED}
    other = make_namespace(storage_of_pods, **elsewhere)
    run = make_run(where=other, compute={"retries": 1})
    ended = topwork("submit", run.file, "--follow", namespace=other.namespace)
    assert ended.code == 75, ended.said
    assert CLOSED in ended.said
    assert run.condition("Failed")["reason"] == "BackoffLimitExceeded"
    assert len(run.pods()) == 2


def test_a_gate_that_is_not_met_ends_with_3(make_run, topwork):
    gate = {"metric": "calibrationError", "atMost": 0.0}
    run = make_run(evaluate={"metrics": ["calibrationError"], "gates": [gate]})
    ended = topwork("submit", run.file, "--follow")
    assert ended.code == 3, ended.said
    assert "calibrationError" in ended.said
    assert_failed_at_once(run, 3)
    status = topwork("status", run.name)
    assert "calibrationError" in status.said


def quota(hard: dict[str, str]) -> dict[str, object]:
    return {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "tight"}, "spec": {"hard": hard}}


def wait_for_quota(kubectl: Kubectl) -> None:
    """Until the quota controller has counted for the first time, everything or nothing may be let in."""

    def counted() -> object:
        found = kubectl.get("resourcequota", "tight")
        return found and found.get("status", {}).get("used")

    eventually(counted, "the first count of the quota", seconds=60)


def test_a_quota_without_room_for_the_pod_is_told_in_words(make_run, make_namespace, topwork, storage_of_pods):
    other = make_namespace(storage_of_pods)
    other.apply(quota({"requests.cpu": "10m"}))
    wait_for_quota(other)
    run = make_run(where=other)
    followed = topwork.start("submit", run.file, "--follow", namespace=other.namespace)
    followed.wait_for("quota tight", "requests.cpu", seconds=NOTICE_SECONDS)
    cancel(run, topwork, namespace=other.namespace)
    assert followed.wait(seconds=GONE_SECONDS).code == 143


def test_a_quota_without_room_for_the_job_refuses_the_submit(make_run, make_namespace, topwork, storage_of_pods):
    other = make_namespace(storage_of_pods)
    other.apply(quota({"count/jobs.batch": "0"}))
    wait_for_quota(other)
    run = make_run(where=other)
    refused = topwork("submit", run.file, namespace=other.namespace)
    assert refused.code == 2, refused.said
    assert "quota" in refused.said
    assert "Traceback" not in refused.said
    assert run.kubernetes_job() is None


def test_pod_security_that_refuses_the_pod_is_told_in_words(make_run, topwork, namespace):
    run = make_run()
    rendered = topwork("render", run.file, "-o", "json")
    assert rendered.code == 0, rendered.said
    objects = json.loads(rendered.out)["items"]
    job = next(each for each in objects if each["kind"] == "Job")
    # What the renderer never writes: somebody's webhook, or a hand, did it.
    job["spec"]["template"]["spec"]["containers"][0]["securityContext"]["allowPrivilegeEscalation"] = True
    namespace.apply(*objects)
    followed = topwork.start("status", run.name, "--follow")
    followed.wait_for("Pod Security", "restricted", "allowPrivilegeEscalation", seconds=NOTICE_SECONDS)
    cancel(run, topwork)
    assert followed.wait(seconds=GONE_SECONDS).code == 143


def test_an_image_that_is_nowhere_is_told_in_words(make_run, topwork):
    run = make_run()
    # .invalid is reserved (RFC 2606): no registry is ever there.
    image = "registry.invalid/topwork:none"
    followed = topwork.start("submit", run.file, "--follow", "--image", image)
    followed.wait_for(f"the image {image} can't be pulled", seconds=START_SECONDS)
    cancel(run, topwork)
    assert followed.wait(seconds=GONE_SECONDS).code == 143


def test_the_deadline_ends_a_run_with_75_and_its_checkpoint(make_run, topwork, storage_of_pods):
    run = make_run(transfer=LONG, compute={"deadlineSeconds": 120})
    ended = topwork("submit", run.file, "--follow", seconds=START_SECONDS + GONE_SECONDS)
    assert ended.code == 75, ended.said
    assert "deadlineSeconds" in ended.said
    assert run.condition("Failed")["reason"] == "DeadlineExceeded"


def test_gpus_that_no_node_has_are_told_in_words_until_the_deadline(make_run, topwork):
    transfer = {"train": "all", "epochs": 2, "batchSize": 16, "featureCache": "off"}
    run = make_run(transfer=transfer, compute={"gpus": 16, "deadlineSeconds": 90})
    ended = topwork("submit", run.file, "--follow")
    assert ended.code == 75, ended.said
    assert "nvidia.com/gpu" in ended.said
    assert "deadlineSeconds" in ended.said


def test_a_namespace_that_is_not_there_is_named_with_the_command_that_makes_it(make_run, topwork):
    run = make_run()
    refused = topwork("submit", run.file, namespace="topwork-test-nowhere")
    assert refused.code == 2, refused.said
    assert "kubectl create namespace topwork-test-nowhere" in refused.said
    assert "Traceback" not in refused.said


def test_a_run_that_is_not_there_is_named(topwork):
    for command in ("status", "logs"):
        refused = topwork(command, "never-submitted")
        assert refused.code == 2, refused.said
        assert "never-submitted" in refused.said
        assert "Traceback" not in refused.said
