"""`topwork submit` of TransferJobs: what is applied, changed, replaced or left unchanged."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import api_statuses
import pytest
import sample_objects
import sample_transfer_jobs as samples
import yaml
from api_server import ApiServer
from api_statuses import Fault
from running_controller import running_controller
from sample_objects import IMAGE, MODEL, RUN, SOURCE_NOTE, transfer_job
from sample_transfer_jobs import put_job, put_transfer_job, set_status
from simulated_cluster import Command, write_spec

from topwork.clients.kubernetes.cluster import Cluster
from topwork.cluster.definition import definition
from topwork.cluster.manifests.render import RenderOptions
from topwork.cluster.operations.submit_transfer_job import TransferJobSubmission, build_object
from topwork.errors import SettingError

Topwork = Callable[..., tuple[int, list[str]]]
Object = dict[str, Any]
NEXT = [
    "  follow  topwork status flowers -n team-a --follow",
    "  logs    topwork logs flowers -n team-a -f",
]


@pytest.fixture
def server(api_server: ApiServer) -> ApiServer:
    """An API server that serves TransferJobs."""
    api_server.install_crd(definition())
    return api_server


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_spec(tmp_path / "flowers.yaml")


def stored(server: ApiServer) -> Object:
    obj = server.get("TransferJob", "flowers")
    assert obj is not None
    return obj


def annotations(server: ApiServer) -> dict[str, str]:
    return stored(server)["metadata"].get("annotations") or {}


def writes(server: ApiServer) -> list[str]:
    return [
        f"{request.method} {request.path.rpartition('/')[2]}"
        for request in server.requests
        if request.method != "GET" and not request.query.get("dryRun")
    ]


def test_submit_applies_only_the_transferjob(topwork: Topwork, server: ApiServer, file: Path):
    assert topwork("submit", file) == (
        0,
        [f"transferjob/flowers submitted in namespace team-a as run {RUN}", *NEXT, SOURCE_NOTE],
    )
    assert writes(server) == ["PATCH flowers"]
    assert (server.list("Job"), server.list("ConfigMap")) == ([], [])
    manager = stored(server)["metadata"]["managedFields"][0]
    assert (manager["manager"], manager["operation"]) == ("topwork", "Apply")


def test_as_job_applies_a_plain_job(topwork: Topwork, server: ApiServer, file: Path):
    code, lines = topwork("submit", file, "--as", "job")
    assert (code, lines[0]) == (0, f"transferjob flowers submitted as job.batch/{RUN} in namespace team-a")
    assert server.list("TransferJob") == []


def test_as_transferjob_requires_the_definition(topwork: Topwork, api_server: ApiServer, file: Path):
    code, lines = topwork("submit", file, "--as", "transferjob")
    assert code == 2
    assert lines == [
        "topwork: The cluster does not serve TransferJobs: their CustomResourceDefinition is not installed. An "
        "administrator installs it and the controller with the Helm chart or k8s/controller. To submit plain Jobs, use "
        "--as job."
    ]


def test_account_that_may_not_read_discovery_chooses(topwork: Topwork, server: ApiServer, file: Path):
    message = 'forbidden: User "alice" cannot get path "/apis/topwork.dev/v1alpha1"'
    denied = api_statuses.status(403, "Forbidden", message)
    server.inject(Fault(denied, path="/apis/topwork.dev/v1alpha1"))
    code, lines = topwork("submit", file)
    assert code == 2
    assert lines[0].startswith("topwork: Cannot read whether the cluster serves TransferJobs: ")
    assert lines[0].endswith("Choose with --as job or --as transferjob.")
    assert writes(server) == []


def test_defaults_of_the_namespace_are_shown_but_not_written(topwork: Topwork, server: ApiServer, tmp_path: Path):
    text = "spec: {storage: s3://artifacts/topwork, compute: {queue: team-a}}"
    metadata = {"name": "topwork-defaults"}
    server.put({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {"defaults.yaml": text}})
    spec = sample_objects.spec()
    del spec["spec"]["storage"]
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(spec))
    code, lines = topwork("submit", tmp_path / "job.yaml")
    assert code == 0
    assert lines[0] == (
        'from configmap/topwork-defaults: spec.storage "s3://artifacts/topwork", spec.compute.queue "team-a"'
    )
    assert "storage" not in stored(server)["spec"]
    assert "queue" not in stored(server)["spec"]["compute"]


def test_invalid_files_apply_nothing_and_list_all_problems(topwork: Topwork, server: ApiServer, tmp_path: Path):
    spec = sample_objects.spec(gpus=-1)
    spec["spec"]["dataset"]["source"]["folder"]["uri"] = "/photos"
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(spec))
    write_spec(tmp_path / "valid.yaml")
    code, lines = topwork("submit", tmp_path / "valid.yaml", tmp_path / "job.yaml")
    assert code == 2
    assert any("spec.compute.gpus" in line for line in lines)
    assert writes(server) == []


def test_path_on_this_machine_is_rejected(topwork: Topwork, server: ApiServer, tmp_path: Path):
    spec = sample_objects.spec()
    spec["spec"]["dataset"]["source"]["folder"]["uri"] = "/photos"
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(spec))
    code, lines = topwork("submit", tmp_path / "job.yaml")
    assert (code, "is a path on this machine" in lines[0]) == (2, True)


def test_two_files_with_the_same_name_are_rejected(topwork: Topwork, server: ApiServer, tmp_path: Path):
    one, two = write_spec(tmp_path / "one.yaml"), tmp_path / "two.yaml"
    spec = sample_objects.spec()
    spec["spec"]["seed"] = 7
    two.write_text(yaml.safe_dump(spec))
    assert topwork("submit", one, two) == (
        2,
        [
            f"{two}: has the same name as {one}, so one TransferJob would replace the other. Remove one, or change "
            "metadata.name."
        ],
    )


def test_namespace_of_the_file_is_used(topwork: Topwork, server: ApiServer, tmp_path: Path):
    spec = sample_objects.spec()
    spec["metadata"]["namespace"] = "default"
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(spec))
    code, lines = topwork("submit", file)
    assert (code, lines[0]) == (0, f"transferjob/flowers submitted in namespace default as run {RUN}")
    assert server.get("TransferJob", "flowers", namespace="default") is not None
    assert lines[1] == "  follow  topwork status flowers -n default --follow"
    for kind in ("job", "transferjob"):
        assert topwork("submit", file, "-n", "team-a", "--as", kind) == (
            2,
            [
                f"{file}: metadata.namespace is default, but --namespace is team-a. Remove one of them: a file is "
                "submitted to the namespace that it names."
            ],
        )


def test_image_pin_and_restart_are_part_of_the_object(topwork: Topwork, server: ApiServer, file: Path):
    code, lines = topwork("submit", file, "--image", IMAGE, "--restart", "--set", "spec.compute.image=other:1")
    assert code == 0, lines
    assert stored(server)["spec"]["compute"]["image"] == IMAGE
    assert annotations(server) == {"topwork.dev/restart": "true"}


def test_client_dry_run_prints_the_object_without_requests(topwork: Topwork, server: ApiServer, file: Path):
    code, lines = topwork("submit", file, "--dry-run=client", "--as", "transferjob", "--image", IMAGE)
    (obj,) = yaml.safe_load_all("\n".join(lines))
    expected = sample_objects.spec()
    expected["spec"]["compute"]["image"] = IMAGE
    assert (code, obj, server.requests) == (0, expected, [])


def test_server_dry_run_stores_nothing(topwork: Topwork, server: ApiServer, file: Path):
    line = "transferjob.topwork.dev/flowers {} (server dry run)"
    assert topwork("submit", file, "--dry-run=server") == (0, [line.format("serverside-applied")])
    assert server.list("TransferJob") == []
    topwork("submit", file)
    set_status(server, samples.COMPLETE)
    assert topwork("submit", file, "--dry-run=server") == (0, [line.format("unchanged, complete")])
    set_status(server, samples.FAILED)
    before = stored(server)
    assert topwork("submit", file, "--dry-run=server") == (0, [line.format("would be replaced")])
    assert stored(server) == before


def test_wait_for_data_is_for_plain_jobs(topwork: Topwork, server: ApiServer, tmp_path: Path):
    file = write_spec(tmp_path / "flowers.yaml", prefetch=True)
    code, lines = topwork("submit", file, "--wait-for-data")
    assert (code, lines[0].startswith("topwork: --wait-for-data requires --as job.")) == (2, True)


# An existing TransferJob


def test_same_spec_leaves_an_active_transferjob_unchanged(topwork: Topwork, server: ApiServer, file: Path):
    topwork("submit", file)
    set_status(server, samples.PENDING)
    server.requests.clear()
    code, lines = topwork("submit", file)
    assert code == 0
    assert lines[0] == (
        f"transferjob/flowers unchanged in namespace team-a: {RUN} is pending: the queue team-a has no free GPUs"
    )
    assert writes(server) == []


def test_same_spec_leaves_a_complete_transferjob_unchanged(topwork: Topwork, server: ApiServer, file: Path):
    topwork("submit", file)
    set_status(server, samples.COMPLETE)
    server.requests.clear()
    code, lines = topwork("submit", file)
    assert code == 0
    assert lines[:2] == [
        f"transferjob/flowers unchanged in namespace team-a: {RUN} is complete",
        f"  model  {MODEL}",
    ]
    assert lines[2].startswith(
        f"Note: the source was not checked, and images may have changed since {RUN} was complete"
    )
    assert writes(server) == []


def test_changed_spec_names_the_run_that_is_replaced(topwork: Topwork, server: ApiServer, file: Path):
    topwork("submit", file)
    set_status(server, samples.status("Running"))
    code, lines = topwork("submit", file, "--set", "spec.seed=7")
    assert code == 0
    new = stored(server)
    assert new["spec"]["seed"] == 7
    assert new["metadata"]["generation"] == 2
    run = lines[1].rpartition(" ")[2]
    assert run not in {"", RUN}
    assert lines[:2] == [
        f"transferjob/flowers has changed: {RUN} is stopped with a checkpoint and replaced by {run}",
        f"transferjob/flowers changed in namespace team-a; its run is {run}",
    ]


def test_changed_compute_is_applied_in_place(topwork: Topwork, server: ApiServer, file: Path):
    topwork("submit", file)
    set_status(server, samples.SUSPENDED)
    code, lines = topwork("submit", file, "--set", "spec.compute.gpus=1")
    assert (code, lines[0]) == (0, f"transferjob/flowers changed in namespace team-a; its run is {RUN}")
    assert stored(server)["spec"]["compute"]["gpus"] == 1


@pytest.mark.parametrize(
    ("status", "options", "line"),
    [
        (
            samples.FAILED,
            (),
            "has failed and is replaced: the run reuses its stages and resumes from its last checkpoint",
        ),
        (
            samples.CANCELLED,
            (),
            "was canceled and is replaced: the run reuses its stages and resumes from its last checkpoint",
        ),
        (samples.COMPLETE, ("--restart",), "is complete and is replaced: the run starts over"),
    ],
    ids=["failed", "canceled", "restart"],
)
def test_finished_transferjob_is_replaced(
    topwork: Topwork, server: ApiServer, file: Path, status: Object, options: tuple[str, ...], line: str
):
    topwork("submit", file)
    before = set_status(server, status)
    code, lines = topwork("submit", file, *options)
    assert code == 0
    assert lines[:2] == [
        f"transferjob/flowers {line}",
        f"transferjob/flowers submitted in namespace team-a as run {RUN}",
    ]
    after = stored(server)
    assert after["metadata"]["uid"] != before["metadata"]["uid"]
    assert "status" not in after


def test_spec_that_the_server_rejects_does_not_delete_the_failed_transferjob(
    topwork: Topwork, server: ApiServer, file: Path
):
    topwork("submit", file)
    before = set_status(server, samples.FAILED)
    rejected = api_statuses.status(403, "Forbidden", 'admission webhook "policy" denied the request: too many GPUs')
    server.inject(Fault(rejected, method="PATCH"))
    code, lines = topwork("submit", file)
    assert (code, "too many GPUs" in lines[-1]) == (2, True)
    assert stored(server) == before


def test_restart_of_an_active_transferjob_is_rejected(topwork: Topwork, server: ApiServer, file: Path):
    topwork("submit", file)
    set_status(server, samples.status("Running"))
    code, lines = topwork("submit", file, "--restart")
    assert code == 2
    assert lines[-1] == (
        "topwork: transferjob/flowers in namespace team-a is not finished, so --restart would delete results in use. "
        "Wait until it is finished, or stop it with: topwork cancel flowers -n team-a"
    )


def test_values_of_another_tool_that_change_the_run_are_rejected(topwork: Topwork, server: ApiServer, file: Path):
    other = sample_objects.spec()
    other["metadata"]["namespace"] = "team-a"
    other["spec"]["augmentation"] = {"rotation": 0.25}
    server.put(other | {"status": samples.status("Running", run="flowers-other123")}, manager="kubectl")
    before = stored(server)
    code, lines = topwork("submit", file)
    assert code == 2
    assert "would keep values that another tool set, and that this spec does not set: " in lines[-1]
    assert "spec.augmentation.rotation: 0.0 → 0.25" in lines[-1]
    assert stored(server) == before


# The same run in the other form


def test_unfinished_plain_job_with_the_same_run_is_not_submitted_twice(topwork: Topwork, server: ApiServer, file: Path):
    server.put(sample_objects.job())
    code, lines = topwork("submit", file)
    assert code == 2
    assert lines[-1] == (
        f"topwork: job.batch/{RUN} in namespace team-a is the same run, submitted as a plain Job, and is not finished. "
        f"Wait until it is finished, or stop it with: topwork cancel {RUN} --as job -n team-a"
    )
    assert server.list("TransferJob") == []
    server.put(sample_objects.completed_job())
    assert topwork("submit", file)[0] == 0


def test_unfinished_transferjob_with_the_same_run_is_not_submitted_as_a_job(
    topwork: Topwork, server: ApiServer, file: Path
):
    put_job(server, put_transfer_job(server, samples.status("Running")))
    for options in ((), ("--dry-run=server",)):
        code, lines = topwork("submit", file, "--as", "job", *options)
        assert code == 2
        assert lines[-1] == (
            "topwork: transferjob/flowers in namespace team-a is the same run and is not finished. Submit it without "
            "--as job, or stop it with: topwork cancel flowers -n team-a"
        )
    assert writes(server) == []


# A source that changes


@pytest.fixture
def submission(server: ApiServer, cluster: Cluster) -> Callable[..., TransferJobSubmission]:
    def make(**options: Any) -> TransferJobSubmission:
        obj = build_object(transfer_job(), RenderOptions(namespace="team-a", dataset=options.pop("dataset", "")))
        return TransferJobSubmission(cluster, obj, RUN, lambda _: None, **options)

    return make


def test_complete_transferjob_is_replaced_if_its_source_has_changed(
    submission: Callable[..., TransferJobSubmission], server: ApiServer
):
    assert submission(checked_run="flowers-11111111").submit() == "submitted"
    set_status(server, samples.COMPLETE)
    # Another job may already have pulled the changed source.
    assert submission(checked_run="flowers-11111111", source_changed=False).submit() == "complete"
    assert submission().submit() == "complete"
    assert submission(checked_run="flowers-22222222").submit() == "replaced"
    assert annotations(server) == {"topwork.dev/checked-run": "flowers-22222222"}


def test_transferjob_of_kubectl_is_replaced_if_its_source_has_changed(
    submission: Callable[..., TransferJobSubmission], server: ApiServer, cluster: Cluster
):
    cluster.apply(sample_objects.spec(), manager="kubectl")
    set_status(server, samples.COMPLETE)
    assert submission(checked_run="flowers-11111111").submit() == "complete"
    assert submission(checked_run="flowers-11111111", source_changed=True).submit() == "replaced"


def test_dataset_of_an_active_transferjob_cannot_be_changed(
    submission: Callable[..., TransferJobSubmission], server: ApiServer
):
    submission(dataset="datasets/flowers/1").submit()
    assert annotations(server) == {"topwork.dev/dataset": "datasets/flowers/1"}
    set_status(server, samples.status("Running"))
    assert submission(dataset="datasets/flowers/1").submit() == "unchanged"
    with pytest.raises(
        SettingError, match="is not finished and uses datasets/flowers/1, not the dataset of its source"
    ):
        submission().submit()


def test_complete_run_is_run_again_on_request(submission: Callable[..., TransferJobSubmission], server: ApiServer):
    submission().submit()
    set_status(server, samples.COMPLETE)
    assert submission().submit(rerun=True) == "replaced"
    assert annotations(server) == {}


# With the controller


def test_followed_run_is_suspended_and_resumed_with_the_controller(
    api_server: ApiServer, cluster: Cluster, kubeconfig: Path, file: Path
):
    with (
        running_controller(api_server, cluster) as world,
        Command("submit", str(file), "--follow", kubeconfig=kubeconfig) as command,
    ):
        command.expect("transfer started")
        world.suspend()
        command.expect("suspended: ")
        assert world.active_pods() == []
        world.suspend(False)
        command.expect("started on node")
        assert command.wait() == 0


def test_submit_follow_cancel_and_submit_again_with_the_controller(
    api_server: ApiServer, cluster: Cluster, kubeconfig: Path, topwork: Topwork, file: Path
):
    with running_controller(api_server, cluster) as world:
        with Command("submit", str(file), "--follow", kubeconfig=kubeconfig) as command:
            command.expect("transfer started")
            code, lines = topwork("cancel", "flowers")
            assert (code, lines[-3]) == (0, f"{RUN} is canceled"), lines
            assert command.wait() == 143
        assert topwork("status", "flowers")[1][0] == f"{RUN} in namespace team-a: cancelled"
        assert world.active_pods() == []
        with Command("submit", str(file), "--follow", kubeconfig=kubeconfig) as command:
            assert command.wait() == 0
        assert command.lines[-1].startswith("model s3://")
        code, lines = topwork("submit", file)
        assert (code, lines[0]) == (0, f"transferjob/flowers unchanged in namespace team-a: {RUN} is complete")
    assert world.kubernetes.overlapping_pods() == []
