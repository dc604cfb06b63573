"""Parts of the status of a TransferJob: attempts and GPU time, progress from metrics pages, and the object cache."""

import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
import sample_objects
from api_server import ApiServer
from controlled_cluster import ControlledCluster, run_of
from sample_objects import NOW, RUN, at, failed, running, stopped

from topwork.clients.kubernetes.cluster import Cluster
from topwork.cluster.controller.attempt_history import update_history
from topwork.cluster.controller.object_cache import Key, ObjectCache
from topwork.cluster.transfer_job_status import MAX_ATTEMPTS, TransferJobStatus

Object = dict[str, Any]

# ── Attempts ────────────────────────────────────────────────────────────────────────────────────────────────────────


def add(previous: TransferJobStatus, *pods: Object, seconds: float, run: str = RUN) -> TransferJobStatus:
    history = update_history(previous, run, pods, NOW + timedelta(seconds=seconds))
    update = {"attempt_history": history.records, "attempts": history.attempts, "gpu_seconds": history.gpu_seconds}
    return previous.model_copy(update={"run": run, **update})


def attempt(number: int, states: Object, **options: Any) -> Object:
    return sample_objects.pod(states, suffix=f"p{number:04}", created=1000 * number, **options)


def test_a_pod_counts_once_however_often_it_is_seen() -> None:
    pod = sample_objects.pod({"pull": running()})
    status = add(TransferJobStatus(), pod, seconds=102)
    assert (status.attempts, status.gpu_seconds) == (1, 200.0)  # 2 GPUs since it was scheduled at 2 s
    assert add(status, pod, seconds=102) == status
    later = add(status, pod, seconds=202)
    assert (later.attempts, later.gpu_seconds) == (1, 400.0)


def test_gpu_time_ends_with_the_last_container() -> None:
    pod = sample_objects.pod({"pull": failed("pull", 75, "storage")}, phase="Failed")
    status = add(TransferJobStatus(), pod, seconds=5000)
    assert (status.gpu_seconds, status.attempt_history[0].ended) == (196.0, NOW + timedelta(seconds=100))
    assert add(status, pod, seconds=9000) == status
    assert add(status, seconds=9000) == status  # the pod is deleted


def test_a_pod_that_vanished_ended_when_that_was_noticed() -> None:
    status = add(TransferJobStatus(), sample_objects.pod({"pull": running()}), seconds=102)
    gone = add(status, seconds=300)
    record = gone.attempt_history[0]
    assert (record.ended, record.error) == (NOW + timedelta(seconds=300), "the pod was deleted")
    assert add(gone, seconds=900) == gone


def test_old_attempts_are_dropped_but_their_gpu_time_is_kept() -> None:
    states = {"pull": stopped("pull")}
    pods = [attempt(number, states, phase="Failed") for number in range(MAX_ATTEMPTS + 5)]
    status = TransferJobStatus()
    for count in range(len(pods) + 1):
        status = add(status, *pods[:count], seconds=10**6)
    assert (status.attempts, len(status.attempt_history)) == (MAX_ATTEMPTS + 5, MAX_ATTEMPTS)
    assert status.attempt_history[-1].pod == f"{RUN}-p0024"
    assert status.gpu_seconds == 196.0 * (MAX_ATTEMPTS + 5)
    assert add(status, *pods, seconds=10**6) == status


def test_pods_of_the_earlier_run_stay_in_the_history_until_they_end() -> None:
    pod = sample_objects.pod({"pull": running()})
    status = add(TransferJobStatus(), pod, seconds=102)
    other = add(status, pod, seconds=202, run="flowers-00000000")
    assert (other.attempts, len(other.attempt_history), other.gpu_seconds) == (0, 1, 400.0)
    ended = sample_objects.pod({"pull": stopped("pull")}, phase="Failed")
    last = add(other, ended, seconds=300, run="flowers-00000000")
    assert (last.attempts, last.attempt_history, last.gpu_seconds) == (0, (), 196.0)
    assert add(last, ended, seconds=400, run="flowers-00000000") == last


def test_long_errors_of_attempts_are_cut() -> None:
    pod = sample_objects.pod({"pull": failed("pull", 2, "x" * 3000)}, phase="Failed")
    status = add(TransferJobStatus(), pod, seconds=102)
    assert len(status.attempt_history[0].error or "") <= 250


# ── Progress ────────────────────────────────────────────────────────────────────────────────────────────────────────

PAGE = """
topwork_stage_running{{run="{run}",transferjob="flowers",stage="pull"}} 1
topwork_stage_start_timestamp_seconds{{run="{run}",stage="pull"}} {start}
topwork_epoch{{run="{run}",stage="pull"}} 3
topwork_epochs_planned{{run="{run}",stage="pull"}} 10
topwork_best_metric{{run="{run}",stage="pull",name="accuracy",split="validation"}} 0.93125
"""


@pytest.fixture
def metrics_port() -> Iterator[int]:
    """Port of a metrics page like that of a running stage."""
    page = PAGE.format(run=run_of(), start=datetime.now(UTC).timestamp() - 70)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(page.encode())

        def log_message(self, *_: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server.server_port
        server.shutdown()


def serve_metrics(world: ControlledCluster, port: int) -> None:
    pod = world.server.list("Pod")[0]
    pod["spec"]["initContainers"][0]["ports"][0]["containerPort"] = port
    world.server.put(pod)


def test_progress_comes_from_the_metrics_page_of_the_pod(
    api_server: ApiServer, cluster: Cluster, metrics_port: int
) -> None:
    world = ControlledCluster(api_server, cluster, pod_ip="127.0.0.1", start_seconds=5.0)
    world.apply(sample_objects.spec())
    world.settle()
    serve_metrics(world, metrics_port)
    world.advance(20)
    status = world.status()
    assert {key: status.get(key) for key in ("stage", "progress", "metric")} == {
        "stage": "pull",
        "progress": "3/10 epochs",
        "metric": "validation_accuracy 0.9313",
    }
    assert status["eta"].startswith("2m")  # 6.5 epochs, each of which took 20 s
    world.advance(60)
    status = world.status()
    assert (status["stage"], status.get("progress"), status.get("eta")) == ("transfer", None, None)


# ── The cache ───────────────────────────────────────────────────────────────────────────────────────────────────────


def transfer_job(version: int, uid: str = "1") -> Object:
    metadata = {"name": "flowers", "namespace": "team-a", "uid": uid, "resourceVersion": str(version)}
    return {"kind": "TransferJob", "metadata": metadata | {"managedFields": [{}]}}


KEY = Key("team-a", "flowers")


def test_the_cache_assigns_jobs_and_pods_to_their_transfer_job() -> None:
    cache = ObjectCache()
    job, pod = sample_objects.job(), sample_objects.pod()
    assert [cache.update("ADDED", obj) for obj in (job, pod, transfer_job(1))] == [KEY, KEY, KEY]
    cached = cache.get(KEY)
    assert cached and (cached.jobs, cached.pods) == ([job], [pod])
    assert "managedFields" not in cached.transfer_job["metadata"]
    assert cache.update("ADDED", {"kind": "Pod", "metadata": {"name": "other", "namespace": "team-a"}}) is None
    cache.update("DELETED", pod)
    cache.update("DELETED", job)
    assert cache.get(KEY) == (cached.transfer_job, [], [], [])
    cache.update("DELETED", transfer_job(2))
    assert (cache.get(KEY), cache.transfer_jobs()) == (None, [])


def test_the_cache_does_not_go_back_behind_a_write() -> None:
    cache = ObjectCache()
    cache.update("ADDED", transfer_job(1))
    cache.store_written(transfer_job(3))
    cache.update("MODIFIED", transfer_job(2))
    assert [obj["metadata"]["resourceVersion"] for obj in cache.transfer_jobs()] == ["3"]
    cache.update("DELETED", transfer_job(4))
    cache.store_written(transfer_job(5))
    assert cache.transfer_jobs() == []


def test_the_cache_ignores_the_deletion_of_an_earlier_transfer_job() -> None:
    cache = ObjectCache()
    cache.update("ADDED", transfer_job(5, uid="2"))
    cache.update("DELETED", transfer_job(4, uid="1"))
    cache.store_written(transfer_job(6, uid="1"))
    assert [obj["metadata"]["uid"] for obj in cache.transfer_jobs()] == ["2"]


def test_the_cache_keeps_how_deleted_pods_ended_until_it_is_stored() -> None:
    cache = ObjectCache()
    cache.update("ADDED", transfer_job(1))
    pods = [
        sample_objects.pod({"pull": stopped("pull")}, phase="Failed", suffix=f"{number:05}", created=number)
        for number in range(MAX_ATTEMPTS + 1)
    ]
    for pod in pods:
        cache.update("ADDED", pod)
        cache.update("DELETED", pod)
    cached = cache.get(KEY)
    assert cached and cached.ended_pods == pods[1:]
    assert cached.ended_pods[0]["metadata"]["creationTimestamp"] == at(1)
    cache.forget_ended_pods(KEY, [pod["metadata"]["uid"] for pod in pods])
    assert (cache.get(KEY) or cached).ended_pods == []
