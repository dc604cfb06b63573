"""Submitting runs to a simulated API server: what is applied, left unchanged, or rejected."""

import copy
import threading
from collections.abc import Callable
from typing import Any

import api_statuses
import pytest
import sample_objects
from api_server import ApiServer, Fault
from sample_objects import IMAGE, MODEL, RUN, SOURCE_NOTE, done, failed, failed_by_policy, running, transfer_job
from simulated_cluster import Command, SimulatedCluster, wait_for, write_spec

from topwork import __version__
from topwork.clients.kubernetes.cluster import Cluster
from topwork.cluster.manifests.render import RenderedObjects, RenderOptions, render
from topwork.cluster.operations.diff import describe_diff
from topwork.cluster.operations.submit import Submission
from topwork.errors import SettingError, UnavailableError

pytestmark = pytest.mark.timeout(600)


@pytest.fixture
def simulated(api_server: ApiServer) -> SimulatedCluster:
    return SimulatedCluster(api_server)


@pytest.fixture
def reports() -> list[str]:
    return []


@pytest.fixture
def submission(cluster: Cluster, reports: list[str]) -> Callable[..., Submission]:
    def make(**compute: Any) -> Submission:
        return Submission(cluster, rendered(**compute), reports.append, timeout_seconds=1.0)

    return make


def rendered(image: str = IMAGE, **compute: Any) -> RenderedObjects:
    # The grace period is short enough for tests; a spec cannot set it this low.
    objects = render(transfer_job(**compute), RenderOptions(image))
    for job in (objects.training, objects.prefetch):
        if job:
            job["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] = 1
    return objects


def fail(simulated: SimulatedCluster, code: int = 75) -> None:
    simulated.patch_job_status(failed_by_policy("pull", code), failed=1)


def write_requests(server: ApiServer) -> list[str]:
    return [
        f"{request.method} {request.path.rpartition('/')[2]}" for request in server.requests if request.method != "GET"
    ]


def test_new_run_is_applied_in_order_and_owns_its_config_map(submission, api_server):
    assert submission(prefetch=True).submit() == "submitted"
    assert write_requests(api_server) == [f"PATCH {RUN}", f"PATCH {RUN}-pull", f"PATCH {RUN}", f"PATCH {RUN}"]
    owners = api_server.get("ConfigMap", RUN)["metadata"]["ownerReferences"]
    jobs = {name: api_server.get("Job", name)["metadata"]["uid"] for name in (RUN, f"{RUN}-pull")}
    assert owners == [
        {"apiVersion": "batch/v1", "kind": "Job", "name": name, "uid": jobs[name]} for name in sorted(jobs)
    ]


def test_config_map_is_deleted_with_its_job(submission, api_server):
    submission().submit()
    assert submission().cluster.delete("Job", RUN)
    wait_for(lambda: api_server.get("ConfigMap", RUN) is None, "deletion of the ConfigMap")


def test_submitting_the_same_run_twice_changes_nothing(submission, api_server):
    submission().submit()
    before = write_requests(api_server)
    assert submission().submit() == "running"
    assert write_requests(api_server) == before


def test_complete_run_is_left_unchanged_with_any_settings(submission, api_server, simulated):
    submission().submit()
    simulated.finish_run()
    before = write_requests(api_server)
    assert submission(gpus=1).submit() == "complete"
    assert write_requests(api_server) == before


def test_different_settings_of_a_running_job_are_rejected_key_by_key(submission, api_server):
    submission().submit()
    before = write_requests(api_server)
    with pytest.raises(SettingError) as raised:
        submission(gpus=1, memory="64Gi", image="other:2").submit()
    assert str(raised.value) == (
        f"job.batch/{RUN} in namespace team-a is not finished and has different settings: spec.compute.gpus: 2 → 1, "
        f"spec.compute.memory: 32Gi → 64Gi, image: {IMAGE} → other:2. A running Job can't be changed. Wait until it is "
        f"finished, or stop it with: topwork cancel {RUN} -n team-a; if you submit it again, it resumes from its "
        "checkpoint."
    )
    assert write_requests(api_server) == before


def test_diff_reports_the_version_if_nothing_else_differs():
    before, after = rendered(), rendered()
    old = copy.deepcopy(before.training)
    old["metadata"]["labels"]["app.kubernetes.io/version"] = "0.0.9"
    diff = describe_diff((before.config_map, old), (after.config_map, after.training))
    assert diff == f"topwork version: 0.0.9 → {__version__}"


def test_diff_without_the_config_map_compares_the_image():
    before, after = rendered(), rendered("other:2", gpus=1)
    diff = describe_diff((None, before.training), (after.config_map, after.training))
    assert diff == f"image: {IMAGE} → other:2"


def test_diff_limits_the_number_of_changes():
    changed = rendered(
        gpus=1, cpu=2, memory="1Gi", sharedMemory="512Mi", scratch="9Gi", retries=1, deadlineSeconds=60, queue="q"
    )
    before = rendered()
    diff = describe_diff((before.config_map, before.training), (changed.config_map, changed.training))
    assert diff.endswith(", and 2 more")
    assert diff.count(" → ") == 6


def test_failed_run_is_replaced_and_resumes(submission, api_server, simulated, reports):
    submission().submit()
    simulated.put_pod({"pull": failed("pull", 75, "no answer")}, phase="Failed")
    fail(simulated)
    first = api_server.get("Job", RUN)["metadata"]["uid"]
    assert submission(memory="64Gi").submit() == "replaced"
    second = api_server.get("Job", RUN)
    assert second["metadata"]["uid"] != first
    assert api_server.list("Pod") == []
    assert reports == [f"job.batch/{RUN} failed and is replaced: the run resumes from its last checkpoint"]
    config_map = api_server.get("ConfigMap", RUN)
    assert "memory: 64Gi" in config_map["data"]["job.yaml"]
    assert [owner["uid"] for owner in config_map["metadata"]["ownerReferences"]] == [second["metadata"]["uid"]]


def test_submit_waits_for_a_job_being_deleted(submission, api_server, simulated, reports):
    submission().submit()
    first = simulated.wait_for_job()["metadata"]["uid"]
    api_server.deletion_seconds = 0.5
    submission().cluster.delete("Job", RUN, propagation="Foreground")
    assert submission().submit() == "submitted"
    assert simulated.wait_for_job()["metadata"]["uid"] != first
    assert reports == [f"job.batch/{RUN} is being deleted: waiting"]


def test_submit_waits_for_a_failing_job_and_replaces_it(submission, api_server, simulated, reports):
    submission().submit()
    simulated.patch_job_status(failed_by_policy("pull", 75, "FailureTarget"))
    threading.Timer(0.3, lambda: fail(simulated)).start()
    assert submission().submit() == "replaced"
    assert reports[0] == f"job.batch/{RUN} is about to fail: waiting"


def test_job_that_is_not_deleted_is_reported_after_the_timeout(submission, api_server, simulated):
    submission().submit()
    api_server.hold_deletions = True
    submission().cluster.delete("Job", RUN, propagation="Foreground")
    with pytest.raises(UnavailableError) as raised:
        submission().submit()
    assert str(raised.value) == (
        f"job.batch/{RUN} has not ended after 2 s. Is its node down? See kubectl get pods -o wide -n team-a, and "
        "submit again."
    )


def test_submit_waits_for_a_pod_that_writes_its_checkpoint(submission, api_server, simulated, reports):
    terminating = sample_objects.pod({"pull": running()}, deleted=10)
    api_server.put(terminating)
    threading.Timer(0.3, lambda: api_server.remove("Pod", terminating["metadata"]["name"])).start()
    assert submission().submit() == "submitted"
    assert reports == [f"pod/{terminating['metadata']['name']} is still writing its checkpoint: waiting"]


def test_unmanaged_job_with_the_same_name_is_rejected(submission, api_server):
    other = copy.deepcopy(rendered().training)
    other["metadata"]["labels"] = {"app.kubernetes.io/managed-by": "somebody"}
    api_server.put(other)
    with pytest.raises(SettingError) as raised:
        submission().submit()
    assert str(raised.value) == (
        f"job.batch/{RUN} in namespace team-a is not managed by topwork: it has no label "
        "app.kubernetes.io/part-of=topwork. Delete it, or change metadata.name of the spec."
    )
    assert write_requests(api_server) == []


def test_unmanaged_config_map_with_the_same_name_is_rejected(submission, api_server):
    api_server.put({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": RUN}, "data": {"a": "b"}})
    with pytest.raises(SettingError) as raised:
        submission().submit()
    assert str(raised.value).startswith(f"configmap/{RUN} in namespace team-a is not managed by topwork")


def test_stale_config_map_of_kubectl_is_replaced(submission, api_server):
    config_map = copy.deepcopy(rendered(gpus=1).config_map)
    api_server.put(config_map, manager="kubectl-client-side-apply")
    assert submission().submit() == "submitted"
    assert api_server.get("ConfigMap", RUN)["data"] == rendered().config_map["data"]


def test_config_map_of_a_deleted_job_is_recreated(submission, api_server):
    config_map = copy.deepcopy(rendered().config_map)
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": RUN, "uid": "gone"}
    config_map["metadata"]["ownerReferences"] = [owner]
    before = api_server.put(config_map)["metadata"]["uid"]
    assert submission().submit() == "submitted"
    assert api_server.get("ConfigMap", RUN)["metadata"]["uid"] != before


def test_job_applied_by_kubectl_is_the_same_run(submission, api_server):
    for obj in rendered().objects:
        api_server.put(copy.deepcopy(obj), manager="kubectl-client-side-apply")
    assert submission().submit() == "running"


def test_concurrent_submissions_create_one_job(submission, api_server):
    results: list[object] = []

    def submit() -> None:
        results.append(submission().submit())

    threads = [threading.Thread(target=submit) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(results) <= {"submitted", "running"}
    assert "submitted" in results
    assert len(api_server.list("Job")) == 1
    assert api_server.get("ConfigMap", RUN)["metadata"]["ownerReferences"][0]["name"] == RUN


def test_concurrent_submission_with_different_settings_is_rejected(submission, api_server):
    """Another user submits between the check and the apply."""
    other_objects = rendered(gpus=1)
    own_submission = submission()
    get_object = own_submission.cluster.get

    class ClusterWithConcurrentRun(type(own_submission.cluster)):
        """A cluster in which another user applies the run after the first check."""

        job_reads = 0

        def get(self, kind: str, name: str) -> Any:
            obj = get_object(kind, name)
            if kind == "Job":
                ClusterWithConcurrentRun.job_reads += 1
            if kind == "ConfigMap" and ClusterWithConcurrentRun.job_reads == 1:
                for other in other_objects.objects:
                    api_server.put(copy.deepcopy(other), manager="topwork")
            return obj

    cluster = ClusterWithConcurrentRun(own_submission.cluster._client)
    with pytest.raises(SettingError) as raised:
        Submission(cluster, own_submission.rendered, print).submit()
    assert "is not finished and has different settings" in str(raised.value)
    assert str(IMAGE) in str(api_server.get("Job", RUN))


def test_rejection_by_the_api_server_keeps_its_message(submission, api_server):
    quota_exceeded = api_statuses.quota_exceeded(
        "jobs.batch", RUN, "count/jobs.batch=1", "count/jobs.batch=5", "count/jobs.batch=5"
    )
    api_server.inject(Fault(quota_exceeded, method="PATCH", path="/jobs/"), times=10)
    with pytest.raises(SettingError) as raised:
        submission().submit()
    assert "quota" in str(raised.value)


def test_existing_prefetch_job_is_kept_and_a_failed_one_is_replaced(submission, api_server, simulated):
    assert submission(prefetch=True).submit(prefetch_only=True) == "submitted"
    assert api_server.get("Job", RUN) is None
    first = simulated.wait_for_job(f"{RUN}-pull")["metadata"]["uid"]
    assert submission(prefetch=True, memory="64Gi").submit(prefetch_only=True) == "submitted"
    assert simulated.wait_for_job(f"{RUN}-pull")["metadata"]["uid"] == first
    simulated.patch_job_status(failed_by_policy("pull", 2), job=f"{RUN}-pull")
    assert submission(prefetch=True).submit() == "submitted"
    assert simulated.wait_for_job(f"{RUN}-pull")["metadata"]["uid"] != first
    assert len(api_server.get("ConfigMap", RUN)["metadata"]["ownerReferences"]) == 2


def test_restart_replaces_a_complete_job(submission, api_server, simulated, reports):
    submission().submit()
    simulated.finish_run()
    first = api_server.get("Job", RUN)["metadata"]["uid"]
    assert submission().submit(restart=True) == "replaced"
    assert api_server.get("Job", RUN)["metadata"]["uid"] != first
    assert reports == [f"job.batch/{RUN} is complete and is replaced: the run starts over"]


def test_restart_replaces_a_failed_job(submission, api_server, simulated, reports):
    submission().submit()
    fail(simulated)
    assert submission().submit(restart=True) == "replaced"
    assert reports == [f"job.batch/{RUN} failed and is replaced: the run starts over"]


@pytest.mark.parametrize("compute", [{}, {"gpus": 1}], ids=["same settings", "other settings"])
@pytest.mark.parametrize("method", ["submit", "preview"])
def test_restart_of_a_running_job_is_rejected_and_deletes_nothing(submission, api_server, method, compute):
    submission().submit()
    before = write_requests(api_server)
    with pytest.raises(SettingError) as raised:
        getattr(submission(**compute), method)(restart=True)
    assert str(raised.value) == (
        f"job.batch/{RUN} in namespace team-a is not finished, so --restart would delete results in use. Wait until it "
        f"is finished, or stop it with: topwork cancel {RUN} -n team-a"
    )
    assert write_requests(api_server) == before


def test_restart_of_a_new_run_is_submitted(submission):
    assert submission().submit(restart=True) == "submitted"


# The command


def test_submit_prints_the_job_and_the_next_commands(topwork, tmp_path, api_server):
    file = write_spec(tmp_path / "flowers.yaml")
    api_server.send_warnings('would violate PodSecurity "restricted:latest"')
    code, lines = topwork("submit", file, "--image", IMAGE)
    assert code == 0
    assert lines == [
        f"transferjob flowers submitted as job.batch/{RUN} in namespace team-a",
        f"  follow  topwork status {RUN} -n team-a --follow",
        f"  logs    topwork logs {RUN} -n team-a -f",
        SOURCE_NOTE,
        'Warning: would violate PodSecurity "restricted:latest"',
    ]


def test_submit_again_reports_the_existing_run_or_its_model(topwork, tmp_path, simulated):
    file = write_spec(tmp_path / "flowers.yaml")
    topwork("submit", file, "--image", IMAGE)
    assert topwork("submit", file, "--image", IMAGE) == (
        0,
        [
            f"transferjob flowers unchanged: job.batch/{RUN} in namespace team-a already exists",
            f"  follow  topwork status {RUN} -n team-a --follow",
            f"  logs    topwork logs {RUN} -n team-a -f",
            SOURCE_NOTE,
        ],
    )
    simulated.finish_run()
    assert topwork("submit", file, "--image", IMAGE) == (
        0,
        [
            f"transferjob flowers unchanged: job.batch/{RUN} in namespace team-a is complete",
            f"  model  {MODEL}",
            f"Note: the source was not checked, and images may have changed since {RUN} was complete: no storage is "
            f"configured here. To let a pod check it, submit again after: topwork cancel {RUN} -n team-a",
        ],
    )


def test_error_in_the_second_file_applies_nothing(topwork, tmp_path, api_server):
    valid, invalid = write_spec(tmp_path / "valid.yaml"), write_spec(tmp_path / "invalid.yaml", gpus=-1)
    code, lines = topwork("submit", valid, invalid)
    assert (code, write_requests(api_server)) == (2, [])
    assert lines[0].startswith(f"{invalid}:1:")


def test_local_path_is_reported_with_its_file(topwork, tmp_path, api_server):
    file = write_spec(tmp_path / "local.yaml")
    file.write_text(file.read_text().replace("s3://photos/flowers/", "/home/me/flowers"))
    code, lines = topwork("submit", file)
    assert (code, write_requests(api_server)) == (2, [])
    assert lines[0].startswith(f"{file}: spec.dataset.source.folder.uri: ")


def test_two_files_with_the_same_run_are_rejected(topwork, tmp_path, api_server):
    one, two = write_spec(tmp_path / "one.yaml"), write_spec(tmp_path / "two.yaml", gpus=1)
    assert topwork("submit", one, two) == (
        2,
        [
            f"{two}: is the same run, {RUN}, as {one}: the two specs differ only in keys that do not affect the "
            "result. Remove one of them, or change metadata.name."
        ],
    )


def test_wait_for_data_requires_prefetch(topwork, tmp_path, api_server):
    file = write_spec(tmp_path / "flowers.yaml")
    assert topwork("submit", file, "--wait-for-data") == (
        2,
        [f"topwork: --wait-for-data requires spec.compute.prefetch: true, which {file} does not set."],
    )


def test_dry_run_cannot_be_combined_with_follow(topwork, tmp_path, api_server):
    file = write_spec(tmp_path / "flowers.yaml")
    assert topwork("submit", file, "--dry-run=client", "--follow") == (
        2,
        ["topwork: --dry-run can't be combined with --follow or --wait-for-data: it starts no runs."],
    )


def test_client_dry_run_prints_the_output_of_render_without_requests(topwork, tmp_path, api_server):
    file = write_spec(tmp_path / "flowers.yaml", prefetch=True)
    assert topwork("submit", file, "--dry-run=client") == topwork("render", file)
    assert api_server.requests == []


def test_server_dry_run_validates_all_objects_and_stores_none(topwork, tmp_path, api_server):
    file = write_spec(tmp_path / "flowers.yaml", prefetch=True)
    assert topwork("submit", file, "--dry-run=server") == (
        0,
        [
            f"configmap/{RUN} serverside-applied (server dry run)",
            f"job.batch/{RUN}-pull serverside-applied (server dry run)",
            f"job.batch/{RUN} serverside-applied (server dry run)",
        ],
    )
    assert (api_server.list("Job"), api_server.list("ConfigMap")) == ([], [])


def test_server_dry_run_reports_the_existing_job(topwork, tmp_path, simulated):
    file = write_spec(tmp_path / "flowers.yaml")
    topwork("submit", file, "--image", IMAGE)
    assert topwork("submit", file, "--image", IMAGE, "--dry-run=server") == (
        0,
        [f"job.batch/{RUN} unchanged, running (server dry run)"],
    )
    fail(simulated)
    assert topwork("submit", file, "--dry-run=server") == (
        0,
        [f"job.batch/{RUN} would be replaced: it has failed or is being deleted (server dry run)"],
    )


def test_next_command_repeats_the_connection_options(topwork, tmp_path, kubeconfig, api_server):
    file = write_spec(tmp_path / "flowers.yaml")
    _, lines = topwork("submit", file, "--context", "tests", "--kubeconfig", kubeconfig)
    assert lines[1] == f"  follow  topwork status {RUN} -n team-a --context tests --kubeconfig {kubeconfig} --follow"


def test_wait_for_data_submits_the_training_job_after_the_pull(kubeconfig, tmp_path, simulated, api_server):
    file = write_spec(tmp_path / "flowers.yaml", prefetch=True)
    prefetch_job = f"{RUN}-pull"
    with Command("submit", str(file), "--image", IMAGE, "--wait-for-data", kubeconfig=kubeconfig) as command:
        simulated.put_pod({"pull": running()}, job=prefetch_job)
        command.expect("pull started")
        assert api_server.get("Job", RUN) is None
        simulated.put_pod({"pull": done("pull")}, job=prefetch_job, phase="Succeeded")
        simulated.complete_job(job=prefetch_job)
        assert command.wait() == 0
    assert command.lines[1] == f"transferjob flowers pulls its dataset as job.batch/{prefetch_job} in namespace team-a"
    assert f"transferjob flowers submitted as job.batch/{RUN} in namespace team-a" in command.lines
    assert api_server.get("Job", RUN) is not None


def test_wait_for_data_exits_with_the_code_of_a_failed_pull(kubeconfig, tmp_path, simulated, api_server):
    file = write_spec(tmp_path / "flowers.yaml", prefetch=True)
    prefetch_job = f"{RUN}-pull"
    with Command("submit", str(file), "--image", IMAGE, "--wait-for-data", "-f", kubeconfig=kubeconfig) as command:
        simulated.put_pod({"pull": failed("pull", 2, "no image in s3://photos")}, job=prefetch_job, phase="Failed")
        simulated.patch_job_status(failed_by_policy("pull", 2, role="prefetch"), job=prefetch_job, failed=1)
        assert command.wait() == 2
    assert command.lines[-2:] == [
        "failed with exit code 2: no image in s3://photos",
        f"transferjob flowers is not submitted yet. Continue with: topwork submit {file} -n team-a --image {IMAGE} "
        "--wait-for-data",
    ]
    assert api_server.get("Job", RUN) is None


def test_several_runs_are_followed_in_order_and_the_first_failure_is_the_exit_code(kubeconfig, tmp_path, simulated):
    other = copy.deepcopy(sample_objects.SPEC)
    other["metadata"]["name"] = "birds"
    (tmp_path / "birds.yaml").write_text(str(other).replace("'", '"'))
    from topwork.spec import TransferJob

    birds = TransferJob.model_validate(other).run
    files = [str(tmp_path / "birds.yaml"), str(write_spec(tmp_path / "flowers.yaml"))]
    with Command("submit", *files, "--image", IMAGE, "-f", kubeconfig=kubeconfig) as command:
        command.expect(f"following {birds}")
        simulated.patch_job_status(failed_by_policy("fine-tune", 3), job=birds, failed=1)
        command.expect(f"following {RUN}")
        simulated.finish_run()
        assert command.wait() == 3
