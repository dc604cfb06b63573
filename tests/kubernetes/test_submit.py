"""Submitting runs to a server that behaves like the API: what is applied, what is left alone, what is refused."""

import copy
from collections.abc import Callable
from typing import Any

import api_statuses
import pytest
import states
from api_server import ApiServer, Fault
from played import Command, Played, eventually, spec_file
from states import IMAGE, MODEL, RUN, by_policy, done, failed, running, transfer_job

from topwork.clients.kubernetes.cluster import Cluster
from topwork.cluster.manifests.render import Placement, Rendered, render
from topwork.cluster.operations.diff import differences
from topwork.cluster.operations.submit import Submission
from topwork.errors import SettingError, UnavailableError

pytestmark = pytest.mark.timeout(600)


@pytest.fixture
def played(api_server: ApiServer) -> Played:
    return Played(api_server)


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
def submission(cluster: Cluster, told: list[str]) -> Callable[..., Submission]:
    def make(**compute: Any) -> Submission:
        return Submission(cluster, rendered(**compute), told.append, deletion_seconds=1.0)

    return make


def rendered(image: str = IMAGE, **compute: Any) -> Rendered:
    # A grace period that a test can wait for is below what a spec may say.
    made = render(transfer_job(**compute), Placement(image))
    for job in (made.training, made.prefetch):
        if job:
            job["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] = 1
    return made


def fail(played: Played, code: int = 75) -> None:
    played.status(by_policy("pull", code), failed=1)


def written(server: ApiServer) -> list[str]:
    return [
        f"{request.method} {request.path.rpartition('/')[2]}" for request in server.requests if request.method != "GET"
    ]


def test_a_new_run_is_applied_in_order_and_owns_its_config_map(submission, api_server):
    assert submission(prefetch=True).submit() == "submitted"
    assert written(api_server) == [f"PATCH {RUN}", f"PATCH {RUN}-pull", f"PATCH {RUN}", f"PATCH {RUN}"]
    owners = api_server.get("ConfigMap", RUN)["metadata"]["ownerReferences"]
    jobs = {name: api_server.get("Job", name)["metadata"]["uid"] for name in (RUN, f"{RUN}-pull")}
    assert owners == [
        {"apiVersion": "batch/v1", "kind": "Job", "name": name, "uid": jobs[name]} for name in sorted(jobs)
    ]


def test_the_config_map_goes_with_its_job(submission, api_server):
    submission().submit()
    assert submission().cluster.delete("Job", RUN)
    eventually(lambda: api_server.get("ConfigMap", RUN) is None, "end of the ConfigMap")


def test_the_same_run_twice_changes_nothing(submission, api_server):
    submission().submit()
    before = written(api_server)
    assert submission().submit() == "running"
    assert written(api_server) == before


def test_a_complete_run_is_left_alone_whatever_the_settings_are(submission, api_server, played):
    submission().submit()
    played.finish()
    before = written(api_server)
    assert submission(gpus=1).submit() == "complete"
    assert written(api_server) == before


def test_other_settings_of_a_running_job_are_refused_key_by_key(submission, api_server):
    submission().submit()
    before = written(api_server)
    with pytest.raises(SettingError) as raised:
        submission(gpus=1, memory="64Gi", image="other:2").submit()
    assert str(raised.value) == (
        f"job.batch/{RUN} in namespace team-a is not finished and has other settings: spec.compute.gpus is 2, now 1, "
        f"spec.compute.memory is 32Gi, now 64Gi, the image is {IMAGE}, now other:2. A Job is not changed while "
        f"it runs. Wait for its end, or stop it with: topwork cancel {RUN} -n team-a; submitted again, it goes on from "
        "its checkpoint."
    )
    assert written(api_server) == before


def test_differences_name_a_new_version_of_topwork_where_nothing_else_differs():
    before, after = rendered(), rendered()
    old = copy.deepcopy(before.training)
    old["metadata"]["labels"]["app.kubernetes.io/version"] = "0.0.9"
    told = differences((before.config_map, old), (after.config_map, after.training))
    assert told.startswith("topwork 0.0.9 has rendered it, now it is ")


def test_differences_without_the_config_map_are_those_of_the_image():
    before, after = rendered(), rendered("other:2", gpus=1)
    told = differences((None, before.training), (after.config_map, after.training))
    assert told == f"the image is {IMAGE}, now other:2"


def test_differences_that_are_many_are_counted():
    changed = rendered(
        gpus=1, cpu=2, memory="1Gi", sharedMemory="512Mi", scratch="9Gi", retries=1, deadlineSeconds=60, queue="q"
    )
    before = rendered()
    told = differences((before.config_map, before.training), (changed.config_map, changed.training))
    assert told.endswith(", and 2 more")
    assert told.count(", now ") == 6


def test_a_failed_run_is_replaced_and_goes_on(submission, api_server, played, told):
    submission().submit()
    played.pod({"pull": failed("pull", 75, "no answer")}, phase="Failed")
    fail(played)
    first = api_server.get("Job", RUN)["metadata"]["uid"]
    assert submission(memory="64Gi").submit() == "replaced"
    second = api_server.get("Job", RUN)
    assert second["metadata"]["uid"] != first
    assert api_server.all("Pod") == []
    assert told == [f"job.batch/{RUN} failed and is replaced: the run goes on from its last checkpoint"]
    config_map = api_server.get("ConfigMap", RUN)
    assert "memory: 64Gi" in config_map["data"]["job.yaml"]
    assert [owner["uid"] for owner in config_map["metadata"]["ownerReferences"]] == [second["metadata"]["uid"]]


def test_a_job_that_is_being_deleted_is_waited_for(submission, api_server, played, told):
    submission().submit()
    first = played.job()["metadata"]["uid"]
    api_server.deletion_seconds = 0.5
    submission().cluster.delete("Job", RUN, propagation="Foreground")
    assert submission().submit() == "submitted"
    assert played.job()["metadata"]["uid"] != first
    assert told == [f"job.batch/{RUN} is being deleted: waiting"]


def test_a_job_that_is_about_to_fail_is_waited_for_and_replaced(submission, api_server, played, told):
    import threading

    submission().submit()
    played.status(by_policy("pull", 75, "FailureTarget"))
    threading.Timer(0.3, lambda: fail(played)).start()
    assert submission().submit() == "replaced"
    assert told[0] == f"job.batch/{RUN} is about to fail: waiting"


def test_what_is_being_deleted_and_does_not_go_is_given_up(submission, api_server, played):
    submission().submit()
    api_server.hold_deletions = True
    submission().cluster.delete("Job", RUN, propagation="Foreground")
    with pytest.raises(UnavailableError) as raised:
        submission().submit()
    assert str(raised.value) == (
        f"job.batch/{RUN} does not end: 2 s have passed. Is its node lost? See kubectl get pods -o wide -n team-a, and "
        "submit again."
    )


def test_a_pod_that_still_writes_its_checkpoint_is_waited_for(submission, api_server, played, told):
    import threading

    leaving = states.pod({"pull": running()}, deleted=10)
    api_server.put(leaving)
    threading.Timer(0.3, lambda: api_server.remove("Pod", leaving["metadata"]["name"])).start()
    assert submission().submit() == "submitted"
    assert told == [f"pod/{leaving['metadata']['name']} still writes its checkpoint: waiting"]


def test_a_job_of_the_name_that_is_not_ours_is_left_alone(submission, api_server):
    other = copy.deepcopy(rendered().training)
    other["metadata"]["labels"] = {"app.kubernetes.io/managed-by": "somebody"}
    api_server.put(other)
    with pytest.raises(SettingError) as raised:
        submission().submit()
    assert str(raised.value) == (
        f"job.batch/{RUN} in namespace team-a is not topwork's: it has no label "
        "app.kubernetes.io/part-of=topwork. Delete it, or give the spec another metadata.name."
    )
    assert written(api_server) == []


def test_a_config_map_of_the_name_that_is_not_ours_is_left_alone(submission, api_server):
    api_server.put({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": RUN}, "data": {"a": "b"}})
    with pytest.raises(SettingError) as raised:
        submission().submit()
    assert str(raised.value).startswith(f"configmap/{RUN} in namespace team-a is not topwork's")


def test_a_config_map_that_kubectl_left_over_is_replaced(submission, api_server):
    left = copy.deepcopy(rendered(gpus=1).config_map)
    api_server.put(left, manager="kubectl-client-side-apply")
    assert submission().submit() == "submitted"
    assert api_server.get("ConfigMap", RUN)["data"] == rendered().config_map["data"]


def test_a_config_map_whose_job_is_gone_is_made_anew(submission, api_server):
    left = copy.deepcopy(rendered().config_map)
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": RUN, "uid": "gone"}
    left["metadata"]["ownerReferences"] = [owner]
    before = api_server.put(left)["metadata"]["uid"]
    assert submission().submit() == "submitted"
    assert api_server.get("ConfigMap", RUN)["metadata"]["uid"] != before


def test_a_job_that_kubectl_applied_is_the_same_run(submission, api_server):
    for manifest in rendered().objects:
        api_server.put(copy.deepcopy(manifest), manager="kubectl-client-side-apply")
    assert submission().submit() == "running"


def test_of_two_submissions_at_once_one_is_it_and_the_other_sees_it(submission, api_server):
    import threading

    answers: list[object] = []

    def submit() -> None:
        answers.append(submission().submit())

    threads = [threading.Thread(target=submit) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(answers) <= {"submitted", "running"}
    assert "submitted" in answers
    assert len(api_server.all("Job")) == 1
    assert api_server.get("ConfigMap", RUN)["metadata"]["ownerReferences"][0]["name"] == RUN


def test_a_submission_that_lost_against_one_with_other_settings_is_refused(submission, api_server):
    """Between the look and the apply, somebody else was quicker."""
    theirs = rendered(gpus=1)
    ours = submission()
    look = ours.cluster.get

    class Late(type(ours.cluster)):
        """The cluster as this submission saw it a moment too early."""

        looks = 0

        def get(self, kind: str, name: str) -> Any:
            found = look(kind, name)
            if kind == "Job":
                Late.looks += 1
            if kind == "ConfigMap" and Late.looks == 1:
                for manifest in theirs.objects:
                    api_server.put(copy.deepcopy(manifest), manager="topwork")
            return found

    late = Late(ours.cluster._api)
    with pytest.raises(SettingError) as raised:
        Submission(late, ours.rendered, print).submit()
    assert "is not finished and has other settings" in str(raised.value)
    assert str(IMAGE) in str(api_server.get("Job", RUN))


def test_a_server_that_refuses_leaves_its_sentence(submission, api_server):
    refusal = api_statuses.quota("jobs.batch", RUN, "count/jobs.batch=1", "count/jobs.batch=5", "count/jobs.batch=5")
    api_server.plant(Fault(refusal, method="PATCH", path="/jobs/"), times=10)
    with pytest.raises(SettingError) as raised:
        submission().submit()
    assert "quota" in str(raised.value)


def test_a_prefetch_job_that_is_there_is_left_alone_and_a_failed_one_is_replaced(submission, api_server, played):
    assert submission(prefetch=True).submit(ahead=True) == "submitted"
    assert api_server.get("Job", RUN) is None
    first = played.job(f"{RUN}-pull")["metadata"]["uid"]
    assert submission(prefetch=True, memory="64Gi").submit(ahead=True) == "submitted"
    assert played.job(f"{RUN}-pull")["metadata"]["uid"] == first
    played.status(by_policy("pull", 2), job=f"{RUN}-pull")
    assert submission(prefetch=True).submit() == "submitted"
    assert played.job(f"{RUN}-pull")["metadata"]["uid"] != first
    assert len(api_server.get("ConfigMap", RUN)["metadata"]["ownerReferences"]) == 2


# The command


def test_submit_says_what_was_submitted_and_what_to_type_next(topwork, tmp_path, api_server):
    file = spec_file(tmp_path / "flowers.yaml")
    api_server.warn('would violate PodSecurity "restricted:latest"')
    code, lines = topwork("submit", file, "--image", IMAGE)
    assert code == 0
    assert lines == [
        f"transferjob flowers submitted as job.batch/{RUN} in namespace team-a",
        f"  follow  topwork status {RUN} -n team-a --follow",
        f"  logs    topwork logs {RUN} -n team-a -f",
        'Warning: would violate PodSecurity "restricted:latest"',
    ]


def test_submit_of_the_same_says_that_it_is_there_and_of_a_complete_one_where_its_model_is(topwork, tmp_path, played):
    file = spec_file(tmp_path / "flowers.yaml")
    topwork("submit", file, "--image", IMAGE)
    assert topwork("submit", file, "--image", IMAGE) == (
        0,
        [
            f"transferjob flowers unchanged: job.batch/{RUN} in namespace team-a is there already",
            f"  follow  topwork status {RUN} -n team-a --follow",
            f"  logs    topwork logs {RUN} -n team-a -f",
        ],
    )
    played.finish()
    assert topwork("submit", file, "--image", IMAGE) == (
        0,
        [f"transferjob flowers unchanged: job.batch/{RUN} in namespace team-a is complete", f"  model  {MODEL}"],
    )


def test_an_error_in_the_second_file_applies_nothing(topwork, tmp_path, api_server):
    good, wrong = spec_file(tmp_path / "good.yaml"), spec_file(tmp_path / "wrong.yaml", gpus=-1)
    code, lines = topwork("submit", good, wrong)
    assert (code, written(api_server)) == (2, [])
    assert lines[0].startswith(f"{wrong}:1:")


def test_a_path_of_this_machine_is_told_with_its_file(topwork, tmp_path, api_server):
    file = spec_file(tmp_path / "local.yaml")
    file.write_text(file.read_text().replace("s3://photos/flowers/", "/home/me/flowers"))
    code, lines = topwork("submit", file)
    assert (code, written(api_server)) == (2, [])
    assert lines[0].startswith(f"{file}: spec.dataset.source.folder.uri: ")


def test_two_files_of_one_run_are_refused(topwork, tmp_path, api_server):
    one, two = spec_file(tmp_path / "one.yaml"), spec_file(tmp_path / "two.yaml", gpus=1)
    assert topwork("submit", one, two) == (
        2,
        [
            f"{two}: makes the objects of {RUN}, as {one} does: the two differ in nothing that changes the result. "
            "Leave one out, or change metadata.name."
        ],
    )


def test_wait_for_data_needs_prefetch(topwork, tmp_path, api_server):
    file = spec_file(tmp_path / "flowers.yaml")
    assert topwork("submit", file, "--wait-for-data") == (
        2,
        [f"topwork: --wait-for-data needs spec.compute.prefetch: true, which {file} does not have."],
    )


def test_a_dry_run_waits_for_nothing(topwork, tmp_path, api_server):
    file = spec_file(tmp_path / "flowers.yaml")
    assert topwork("submit", file, "--dry-run=client", "--follow") == (
        2,
        ["topwork: --dry-run starts nothing that --follow or --wait-for-data could wait for. Leave one out."],
    )


def test_a_dry_run_of_the_client_prints_what_render_does_and_asks_nobody(topwork, tmp_path, api_server):
    file = spec_file(tmp_path / "flowers.yaml", prefetch=True)
    assert topwork("submit", file, "--dry-run=client") == topwork("render", file)
    assert api_server.requests == []


def test_a_dry_run_of_the_server_lets_it_check_everything_and_keeps_nothing(topwork, tmp_path, api_server):
    file = spec_file(tmp_path / "flowers.yaml", prefetch=True)
    assert topwork("submit", file, "--dry-run=server") == (
        0,
        [
            f"configmap/{RUN} serverside-applied (server dry run)",
            f"job.batch/{RUN}-pull serverside-applied (server dry run)",
            f"job.batch/{RUN} serverside-applied (server dry run)",
        ],
    )
    assert (api_server.all("Job"), api_server.all("ConfigMap")) == ([], [])


def test_a_dry_run_of_the_server_says_what_is_there(topwork, tmp_path, played):
    file = spec_file(tmp_path / "flowers.yaml")
    topwork("submit", file, "--image", IMAGE)
    assert topwork("submit", file, "--image", IMAGE, "--dry-run=server") == (
        0,
        [f"job.batch/{RUN} unchanged, running (server dry run)"],
    )
    fail(played)
    assert topwork("submit", file, "--dry-run=server") == (
        0,
        [f"job.batch/{RUN} would be replaced: it has failed or is being deleted (server dry run)"],
    )


def test_the_next_command_goes_to_the_same_context(topwork, tmp_path, kubeconfig, api_server):
    file = spec_file(tmp_path / "flowers.yaml")
    _, lines = topwork("submit", file, "--context", "tests", "--kubeconfig", kubeconfig)
    assert lines[1] == f"  follow  topwork status {RUN} -n team-a --context tests --kubeconfig {kubeconfig} --follow"


def test_wait_for_data_takes_gpus_when_the_data_is_there(kubeconfig, tmp_path, played, api_server):
    file = spec_file(tmp_path / "flowers.yaml", prefetch=True)
    ahead = f"{RUN}-pull"
    with Command("submit", str(file), "--image", IMAGE, "--wait-for-data", kubeconfig=kubeconfig) as command:
        played.pod({"pull": running()}, job=ahead)
        command.expect("pull started")
        assert api_server.get("Job", RUN) is None
        played.pod({"pull": done("pull")}, job=ahead, phase="Succeeded")
        played.succeed(job=ahead)
        assert command.end() == 0
    assert command.lines[0] == f"transferjob flowers pulls ahead as job.batch/{ahead} in namespace team-a"
    assert f"transferjob flowers submitted as job.batch/{RUN} in namespace team-a" in command.lines
    assert api_server.get("Job", RUN) is not None


def test_data_that_can_not_be_pulled_takes_no_gpus_and_ends_with_its_exit_code(
    kubeconfig, tmp_path, played, api_server
):
    file = spec_file(tmp_path / "flowers.yaml", prefetch=True)
    ahead = f"{RUN}-pull"
    with Command("submit", str(file), "--image", IMAGE, "--wait-for-data", "-f", kubeconfig=kubeconfig) as command:
        played.pod({"pull": failed("pull", 2, "no image in s3://photos")}, job=ahead, phase="Failed")
        played.status(by_policy("pull", 2, role="prefetch"), job=ahead, failed=1)
        assert command.end() == 2
    assert command.lines[-2:] == [
        "failed with exit code 2: no image in s3://photos",
        f"transferjob flowers is not submitted yet. Go on with: topwork submit {file} -n team-a --wait-for-data",
    ]
    assert api_server.get("Job", RUN) is None


def test_several_files_are_followed_one_after_the_other_and_the_first_failure_is_the_exit_code(
    kubeconfig, tmp_path, played
):
    other = copy.deepcopy(states.SPEC)
    other["metadata"]["name"] = "birds"
    (tmp_path / "birds.yaml").write_text(str(other).replace("'", '"'))
    from topwork.spec import TransferJob

    birds = TransferJob.model_validate(other).run
    files = [str(tmp_path / "birds.yaml"), str(spec_file(tmp_path / "flowers.yaml"))]
    with Command("submit", *files, "--image", IMAGE, "-f", kubeconfig=kubeconfig) as command:
        command.expect(f"following {birds}")
        played.status(by_policy("fine-tune", 3), job=birds, failed=1)
        command.expect(f"following {RUN}")
        played.finish()
        assert command.end() == 3
