"""A Job of its own that pulls the dataset ahead, so that no GPU waits for it."""

import pytest
from tests.cluster.environment import RUN_SECONDS
from tests.cluster.runs import Run

from topwork.clients.kubernetes import KubernetesObject
from topwork.cluster.names import prefetch_job_name

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(2 * RUN_SECONDS)]


def prefetch_job(run: Run) -> KubernetesObject:
    found = run.kubectl.get("job", prefetch_job_name(run.job))
    assert found
    return found


def test_the_training_job_follows_when_the_data_is_there(make_run, topwork):
    run = make_run(compute={"prefetch": True})
    ended = topwork("submit", run.file, "--wait-for-data", "--follow")
    assert ended.exit_code == 0, ended.output
    assert f"{run.job.spec.storage}/models/{run.name}/1" in ended.output
    pulled, trained = prefetch_job(run), run.kubernetes_job()
    assert pulled["status"]["succeeded"] == 1
    # Times of Kubernetes are text that sorts.
    assert pulled["status"]["completionTime"] <= trained["metadata"]["creationTimestamp"]
    containers = [each["name"] for pod in run.pods("prefetch") for each in pod["spec"]["containers"]]
    assert containers == ["pull"]
    assert [pod["spec"].get("initContainers", []) for pod in run.pods("prefetch")] == [[]]


def test_both_jobs_at_once_end_with_one_dataset(make_run, topwork, pod_storage):
    run = make_run(compute={"prefetch": True})
    ended = topwork("submit", run.file, "--follow")
    assert ended.exit_code == 0, ended.output
    manifests = [
        found.key for found in pod_storage.open(run.job.spec.storage).list("datasets/") if "manifest" in found.key
    ]
    assert len(manifests) == 1, manifests


def test_cancel_takes_the_prefetch_job_too(make_run, topwork):
    run = make_run(compute={"prefetch": True})
    submitted = topwork("submit", run.file)
    assert submitted.exit_code == 0, submitted.output
    cancelled = topwork("cancel", run.name)
    assert cancelled.exit_code == 0, cancelled.output
    run.wait_until_deleted()
