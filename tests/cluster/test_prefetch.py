"""The prefetch Job: it pulls the dataset before GPUs are requested."""

import pytest
from tests.cluster.environment import RUN_SECONDS
from tests.cluster.runs import Run

from topwork.clients.kubernetes import KubernetesObject
from topwork.cluster.names import prefetch_job_name

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(2 * RUN_SECONDS)]


def prefetch_job(run: Run) -> KubernetesObject:
    job = run.kubectl.get("job", prefetch_job_name(run.job))
    assert job
    return job


@pytest.mark.smoke
def test_wait_for_data_submits_the_training_job_after_the_pull(make_run, topwork):
    run = make_run(compute={"prefetch": True})
    result = topwork("submit", run.file, "--wait-for-data", "--follow")
    assert result.exit_code == 0, result.output
    assert f"{run.job.spec.storage}/models/{run.name}/1" in result.output
    pulled, trained = prefetch_job(run), run.kubernetes_job()
    assert pulled["status"]["succeeded"] == 1
    # Kubernetes timestamps sort as text.
    assert pulled["status"]["completionTime"] <= trained["metadata"]["creationTimestamp"]
    containers = [container["name"] for pod in run.pods("prefetch") for container in pod["spec"]["containers"]]
    assert containers == ["pull"]
    assert [pod["spec"].get("initContainers", []) for pod in run.pods("prefetch")] == [[]]


def test_concurrent_prefetch_and_training_jobs_store_one_dataset(make_run, topwork, pod_storage):
    run = make_run(compute={"prefetch": True})
    result = topwork("submit", run.file, "--follow")
    assert result.exit_code == 0, result.output
    manifests = [
        stored.key for stored in pod_storage.open(run.job.spec.storage).list("datasets/") if "manifest" in stored.key
    ]
    assert len(manifests) == 1, manifests


def test_cancel_deletes_the_prefetch_job(make_run, topwork):
    run = make_run(compute={"prefetch": True})
    submitted = topwork("submit", run.file)
    assert submitted.exit_code == 0, submitted.output
    canceled = topwork("cancel", run.name)
    assert canceled.exit_code == 0, canceled.output
    run.wait_until_deleted()
