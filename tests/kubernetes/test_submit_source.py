"""Submitting with a real S3 server: the source is checked, and the run is named by the spec and the images."""

import copy
import http.server
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import sample_transfer_jobs as samples
from api_server import ApiServer
from sample_objects import IMAGE, SPEC, failed_by_policy
from sample_transfer_jobs import set_status
from simulated_cluster import SimulatedCluster

from topwork.artifacts import write_artifact
from topwork.cluster.definition import definition
from topwork.data.dataset_manifest import DatasetMetadata, dataset_prefix
from topwork.data.sources import open_source
from topwork.registry.datasets import FORMAT, fingerprint_of, write_entries
from topwork.spec import TransferJob

PHOTOS = ["cat/1.jpg", "cat/2.jpg", "dog/1.jpg", "dog/2.jpg"]
DATASET, RESTART = "topwork.dev/dataset", "topwork.dev/restart"
CHANGES = "3 images added, 1 removed, 1 new class since"


class Photos:
    """A job and its folder of images on S3."""

    def __init__(self, workspace: Any, directory: Path) -> None:
        self.workspace = workspace
        self.folder = workspace.storage.at(f"{workspace.storage.uri}-photos")
        self.content = copy.deepcopy(SPEC)
        self.content["spec"] |= {"storage": workspace.storage.uri}
        self.content["spec"]["dataset"]["source"] = {"folder": {"uri": self.folder.uri}}
        self.file = directory / "flowers.yaml"
        self.write_spec()
        self.add(*PHOTOS)

    @property
    def job(self) -> TransferJob:
        return TransferJob.model_validate(self.content)

    def write_spec(self, file: str = "flowers.yaml", **changes: Any) -> Path:
        """Write the spec with other values of top-level keys."""
        self.content["spec"] |= changes
        path = self.file.with_name(file)
        path.write_text(json.dumps(self.content))
        return path

    def add(self, *names: str) -> None:
        for name in names:
            self.folder.write(name, b"an image")

    def grow(self) -> None:
        self.add("cat/3.jpg", "cat/4.jpg", "fox/1.jpg")
        self.folder.delete(["cat/1.jpg"])

    def store_dataset(self) -> str:
        """Store the manifest and the listing of a dataset, as a pull does, and return its key prefix."""
        source = open_source(self.job.spec.dataset.source, self.workspace)
        fingerprint = fingerprint_of(source, self.job.spec.dataset)
        metadata = DatasetMetadata(
            name=source.name,
            fingerprint=fingerprint,
            pull_format=FORMAT,
            source=source.description(),
            class_names=("cat", "dog"),
            splits={"train": {"cat": 2, "dog": 2}},
            images=4,
            rejected=(),
            duplicates=0,
        )
        directory = self.workspace.scratch / fingerprint
        directory.mkdir()
        if (entries := source.entries()) is not None:
            write_entries(entries, directory)
        prefix = dataset_prefix(source.name, fingerprint)
        write_artifact(self.workspace.storage, prefix, directory, metadata.model_dump(mode="json"))
        return prefix

    def publish_version(self, number: int, dataset: str) -> None:
        latest = {
            "name": "flowers", "version": number, "uri": "s3://…", "run": "flowers-1", "weights": "0a",
            "published": "2030-01-01T00:00:00Z", "main_metric": "accuracy", "metrics": {}, "split": "test",
            "images": 1, "dataset": dataset,
        }  # fmt: skip
        self.workspace.storage.write("models/flowers/latest.json", json.dumps(latest).encode())


@pytest.fixture
def photos(workspace, s3_settings, tmp_path, monkeypatch) -> Photos:
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_settings.endpoint_url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3_settings.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3_settings.secret_key)
    return Photos(workspace, tmp_path)


@pytest.fixture
def submit(topwork):
    """Submit a spec; returns the exit code, the lines, and the name of the Job."""

    def run(file: Path, *options: str) -> tuple[int, list[str], str]:
        code, lines = topwork("submit", file, "--image", IMAGE, *options)
        names = [
            line.partition("job.batch/")[2].split()[0] for line in lines if line.startswith("transferjob flowers ")
        ]
        return code, lines, names[-1] if names else ""

    return run


def pod_annotations(api_server: ApiServer, name: str) -> dict[str, str]:
    return api_server.get("Job", name)["spec"]["template"]["metadata"].get("annotations", {})


def jobs(api_server: ApiServer) -> list[str]:
    return sorted(job["metadata"]["name"] for job in api_server.list("Job"))


# A source that changes


def test_grown_source_is_a_new_run_that_says_what_changed(photos, submit, api_server):
    code, lines, first = submit(photos.file)
    assert (code, lines[0]) == (0, f"transferjob flowers submitted as job.batch/{first} in namespace team-a")
    dataset = photos.store_dataset()
    code, lines, again = submit(photos.file)
    assert (code, again) == (0, first)
    assert lines[0] == f"transferjob flowers unchanged: job.batch/{first} in namespace team-a already exists"

    photos.grow()
    code, lines, second = submit(photos.file)
    assert code == 0
    assert lines[:2] == [
        f"transferjob flowers: source changed: {CHANGES} the last pull; --pinned keeps the previous dataset",
        f"transferjob flowers submitted as job.batch/{second} in namespace team-a",
    ]
    assert jobs(api_server) == sorted({first, second})
    assert api_server.get("ConfigMap", second)["data"] == api_server.get("ConfigMap", first)["data"]
    labels = api_server.get("Job", second)["spec"]["template"]["metadata"]["labels"]
    assert (labels["topwork.dev/run"], labels["topwork.dev/job"]) == (second, "flowers")
    assert pod_annotations(api_server, second) == {}

    photos.publish_version(4, dataset)
    _, lines, third = submit(photos.file)
    assert (lines[0], third) == (
        f"transferjob flowers: source changed: {CHANGES} version 4; --pinned keeps the previous dataset",
        second,
    )


def test_complete_run_does_not_hide_new_images(photos, submit, api_server):
    _, _, first = submit(photos.file)
    photos.store_dataset()
    SimulatedCluster(api_server).complete_job(job=first)
    photos.add("dog/3.jpg")
    _, lines, second = submit(photos.file)
    assert "source changed: 1 image added since the last pull" in lines[0]
    assert "submitted" in lines[1]
    assert second != first


@pytest.mark.parametrize(
    "changes",
    [
        {"evaluate": {"gates": [{"metric": "accuracy", "atLeast": 0.5}]}},
        {"publish": {"formats": ["keras", "savedModel"]}},
        {"fineTune": {"epochs": 3}},
    ],
)
def test_changed_spec_is_another_job_on_the_same_images(photos, submit, changes):
    _, _, first = submit(photos.file)
    photos.store_dataset()
    code, lines, second = submit(photos.write_spec(**changes))
    assert (code, second != first) == (0, True)
    assert not any("source changed" in line for line in lines)


def test_other_file_of_the_base_is_another_job_of_a_dataset_that_never_changes(photos, submit):
    uri = photos.workspace.storage.uri_of("mine.keras")
    photos.workspace.storage.write("mine.keras", b"one")
    model = {"base": {"saved": {"uri": uri}}}
    source = {"tfds": "tf_flowers"}
    file = photos.write_spec(model=model, dataset=photos.content["spec"]["dataset"] | {"source": source})
    names = [submit(file)[2], submit(file)[2]]
    photos.workspace.storage.write("mine.keras", b"two")
    names.append(submit(file)[2])
    assert names[0] == names[1] != names[2] != ""


def test_other_content_of_a_list_is_another_job_and_a_missing_list_an_error(photos, submit, api_server):
    storage = photos.workspace.storage
    splits = {name: {"list": storage.uri_of(f"{name}.txt")} for name in ("train", "validation", "test")}
    file = photos.write_spec(dataset=photos.content["spec"]["dataset"] | {"splits": splits})
    for name in splits:
        storage.write(f"{name}.txt", b"cat/1.jpg")
    names = [submit(file)[2], submit(file)[2]]
    storage.write("test.txt", b"cat/2.jpg")
    names.append(submit(file)[2])
    assert names[0] == names[1] != names[2] != ""
    storage.delete(["test.txt"])
    code, lines, _ = submit(file)
    assert (code, len(jobs(api_server))) == (2, 2)
    assert "spec.dataset.splits.test.list is s3://" in lines[-1]


def test_version_of_a_pinned_test_set_that_does_not_exist_is_an_error(photos, submit, api_server):
    splits = {"train": 0.9, "validation": 0.1, "pinTest": 4}
    for source in (photos.content["spec"]["dataset"]["source"], {"tfds": "tf_flowers"}):
        file = photos.write_spec(dataset=photos.content["spec"]["dataset"] | {"splits": splits, "source": source})
        code, lines, _ = submit(file)
        assert (code, jobs(api_server)) == (2, [])
        assert "spec.dataset.splits.pinTest is 4, but s3://" in lines[-1]
        assert "has no version 4 of the model flowers. Published versions: none." in lines[-1]


# --pinned


def test_pinned_job_has_its_old_name_and_names_its_dataset(photos, submit, api_server):
    _, _, first = submit(photos.file)
    dataset = photos.store_dataset()
    api_server.remove("Job", first)
    photos.grow()
    photos.write_spec(compute={"prefetch": True, "gpus": 1})
    code, lines, pinned = submit(photos.file, "--pinned")
    assert (code, pinned) == (0, first)
    assert not any("source changed" in line for line in lines)
    for name in (pinned, f"{pinned}-pull"):
        assert pod_annotations(api_server, name) == {DATASET: dataset}


def test_pinned_job_without_a_dataset_is_rejected(photos, submit, api_server):
    code, lines, _ = submit(photos.file, "--pinned")
    assert (code, jobs(api_server)) == (2, [])
    assert lines[-1].startswith("topwork: --pinned keeps the dataset that was used before, but storage has no dataset")


@pytest.mark.parametrize(
    ("endpoint", "code", "reason"),
    [(None, 2, "no storage is configured here"), ("http://127.0.0.1:9", 75, "s3://topwork-test")],
    ids=["not configured", "unreachable"],
)
def test_pinned_job_needs_storage(photos, submit, api_server, monkeypatch, endpoint, code, reason):
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    if endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    exit_code, lines, _ = submit(photos.file, "--pinned")
    assert (exit_code, jobs(api_server)) == (code, [])
    assert lines[-1].startswith("topwork: --pinned needs the storage of the job, to find its previous dataset: ")
    assert reason in lines[-1]


# Sources that cannot be checked


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({}, "no storage is configured here"),
        (
            {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"},
            "127.0.0.1:9",
        ),
    ],
    ids=["not configured", "unreachable"],
)
def test_job_is_submitted_with_a_note_if_its_source_cannot_be_checked(
    photos, submit, monkeypatch, api_server, variables, reason
):
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    code, lines, name = submit(photos.file)
    assert (code, jobs(api_server), name) == (0, [photos.job.run], photos.job.run)
    assert lines[-1].startswith("Note: the pod checks the source, not this command: ")
    assert reason in lines[-1]
    SimulatedCluster(api_server).complete_job(job=name)
    code, lines, _ = submit(photos.file)
    assert (code, lines[0]) == (
        0,
        f"transferjob flowers unchanged: job.batch/{name} in namespace team-a is complete",
    )
    assert lines[-1].startswith(f"Note: the source was not checked, and images may have changed since {name} was")


def test_missing_source_is_an_error_and_no_file_is_applied(photos, submit, api_server):
    missing = copy.deepcopy(photos.content)
    missing["metadata"]["name"] = "missing"
    missing["spec"]["dataset"]["source"]["folder"]["uri"] += "-gone"
    second = photos.file.with_name("missing.yaml")
    second.write_text(json.dumps(missing))
    code, lines, _ = submit(photos.file, str(second))
    assert (code, jobs(api_server), api_server.list("ConfigMap")) == (2, [], [])
    assert "-photos-gone" in lines[-1]


@pytest.fixture
def archive_server() -> Iterator[Any]:
    """A web server that tells no version of its archive of 1 GB, ignores ranges, and counts the bytes that it sent."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "1000000000")
            self.end_headers()

        def do_GET(self) -> None:
            self.do_HEAD()
            with suppress(OSError):
                for _ in range(1000):
                    self.wfile.write(bytes(1_000_000))
                    self.server.megabytes += 1

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.megabytes = 0
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_archive_without_a_version_is_not_downloaded(photos, submit, archive_server, api_server):
    source = {"archive": {"uri": f"http://127.0.0.1:{archive_server.server_port}/pets.zip"}}
    photos.write_spec(dataset=photos.content["spec"]["dataset"] | {"source": source})
    code, lines, name = submit(photos.file)
    assert (code, name) == (0, photos.job.run)
    assert lines[-1].startswith("Note: the pod checks the source, not this command: the server of the archive reports")
    # Without a previous dataset, --pinned must not start a job on whatever the archive contains now.
    code, lines, _ = submit(photos.file, "--pinned")
    assert (code, "storage has no dataset of" in lines[-1]) == (2, True)
    source["archive"]["sha256"] = "0" * 64
    photos.write_spec()
    dataset = photos.store_dataset()
    code, lines, pinned = submit(photos.file, "--pinned")
    assert (code, pod_annotations(api_server, pinned)) == (0, {DATASET: dataset})
    assert not any(line.startswith("Note") for line in lines)
    # Buffers of sockets take some megabytes.
    assert archive_server.megabytes < 500


# --restart


def test_restart_replaces_a_complete_job_whose_pod_deletes_the_results(photos, submit, api_server):
    photos.write_spec(compute={"prefetch": True, "gpus": 1})
    _, _, name = submit(photos.file)
    SimulatedCluster(api_server).complete_job(job=name)
    first = api_server.get("Job", name)["metadata"]["uid"]
    code, lines, again = submit(photos.file, "--restart", "--dry-run=server")
    assert (code, lines) == (
        0,
        [f"job.batch/{name} would be replaced: it is finished or is being deleted (server dry run)"],
    )
    assert api_server.get("Job", name)["metadata"]["uid"] == first
    code, lines, again = submit(photos.file, "--restart")
    assert (code, again) == (0, name)
    assert lines[0] == f"job.batch/{name} is complete and is replaced: the run starts over"
    assert api_server.get("Job", name)["metadata"]["uid"] != first
    assert pod_annotations(api_server, name) == {RESTART: "true"}
    assert pod_annotations(api_server, f"{name}-pull") == {}


def test_restart_of_a_running_or_failed_job(photos, submit, api_server):
    _, _, name = submit(photos.file)
    code, lines, _ = submit(photos.file, "--restart")
    assert (code, pod_annotations(api_server, name)) == (2, {})
    assert "is not finished, so --restart would delete results in use" in lines[-1]
    SimulatedCluster(api_server).patch_job_status(failed_by_policy("pull", 3), job=name, failed=1)
    code, lines, _ = submit(photos.file, "--restart")
    assert (code, lines[0]) == (0, f"job.batch/{name} failed and is replaced: the run starts over")
    assert pod_annotations(api_server, name) == {RESTART: "true"}


def test_restart_and_pinned_of_a_new_job(photos, submit, api_server):
    dataset = photos.store_dataset()
    photos.grow()
    code, _, name = submit(photos.file, "--restart", "--pinned")
    assert (code, pod_annotations(api_server, name)) == (0, {DATASET: dataset, RESTART: "true"})


# --dry-run


def test_server_dry_run_checks_the_source(photos, topwork, submit, api_server):
    _, _, first = submit(photos.file)
    photos.store_dataset()
    photos.grow()
    code, lines = topwork("submit", photos.file, "--image", IMAGE, "--dry-run=server")
    assert (code, lines[0]) == (
        0,
        f"transferjob flowers: source changed: {CHANGES} the last pull; --pinned keeps the previous dataset",
    )
    assert lines[-1].endswith("serverside-applied (server dry run)")
    assert first not in lines[-1]
    code, lines = topwork("submit", photos.file, "--image", IMAGE, "--dry-run=server", "--pinned")
    assert (code, lines) == (0, [f"job.batch/{first} unchanged, running (server dry run)"])
    assert jobs(api_server) == [first]


def test_client_dry_run_reads_no_storage(photos, topwork, monkeypatch, api_server):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    code, lines = topwork("submit", photos.file, "--dry-run=client", "--restart")
    assert (code, api_server.requests) == (0, [])
    assert f"  name: {photos.job.run}" in lines
    assert f'        {RESTART}: "true"' in lines
    assert topwork("submit", photos.file, "--dry-run=client", "--pinned") == (
        2,
        ["topwork: --dry-run=client can't be combined with --pinned: it does not read storage."],
    )


# The base installation


def test_submit_checks_every_source_without_the_training_libraries(photos, kubeconfig, submit):
    table = "".join(f"{photos.folder.uri_of(name)},{name.split('/')[0]}\n" for name in PHOTOS)
    photos.workspace.storage.write("table.csv", f"image,label\n{table}".encode())
    photos.workspace.storage.write("pets.zip", b"PK")
    uri = photos.workspace.storage.uri_of
    photos.workspace.storage.write("list.txt", b"cat/1.jpg")
    splits = {name: {"list": uri("list.txt")} for name in ("train", "validation", "test")}
    dataset = photos.content["spec"]["dataset"] | {"splits": splits}
    sources = [dataset["source"], {"archive": {"uri": uri("pets.zip")}}, {"table": {"uri": uri("table.csv")}}]
    files = []
    for index, source in enumerate(sources):
        photos.content["metadata"]["name"] = f"flowers-{index}"
        files.append(str(photos.write_spec(f"{index}.yaml", dataset=dataset | {"source": source})))
        photos.store_dataset()
    code = (
        "import sys\n"
        "for name in ('tensorflow', 'keras', 'PIL', 'numpy', 'tensorflow_datasets', 'sklearn', 'jinja2'):\n"
        "    sys.modules[name] = None\n"
        "sys.argv = ['topwork', 'submit', *sys.argv[1:]]\n"
        "from topwork.cli import main\n"
        "main()\n"
    )
    command = [sys.executable, "-c", code, *files, "--image", IMAGE, "--kubeconfig", str(kubeconfig)]
    completed = subprocess.run([*command, "--pinned"], capture_output=True, text=True, check=False)
    assert (completed.returncode, completed.stderr) == (0, "")
    assert completed.stdout.count(" submitted as job.batch/flowers-") == 3


# TransferJobs


def test_complete_transferjob_is_replaced_after_its_source_has_grown(photos, topwork, api_server):
    api_server.install_crd(definition())
    run = photos.job.run
    code, lines = topwork("submit", photos.file)
    assert (code, lines[0]) == (0, f"transferjob/flowers submitted in namespace team-a as run {run}")
    photos.store_dataset()
    set_status(api_server, samples.status("Running", run=run))
    photos.grow()
    code, lines = topwork("submit", photos.file)
    assert (code, lines[0]) == (0, f"transferjob/flowers unchanged in namespace team-a: {run} is running")
    assert lines[-1] == (
        f"Note: the source changed: {CHANGES} the last pull. Submit again when the run is finished, or after: "
        "topwork cancel flowers -n team-a"
    )
    set_status(api_server, samples.COMPLETE | {"run": run})
    code, lines = topwork("submit", photos.file)
    assert (code, lines[:3]) == (
        0,
        [
            "transferjob/flowers is complete and is replaced: its source has changed",
            f"transferjob flowers: source changed: {CHANGES} the last pull; --pinned keeps the previous dataset",
            f"transferjob/flowers submitted in namespace team-a as run {run}",
        ],
    )
    set_status(api_server, samples.COMPLETE | {"run": run})
    assert (
        topwork("submit", photos.file)[1][0] == f"transferjob/flowers unchanged in namespace team-a: {run} is complete"
    )


def test_pinned_transferjob_uses_the_stored_dataset(photos, topwork, api_server):
    api_server.install_crd(definition())
    dataset = photos.store_dataset()
    photos.grow()
    code, lines = topwork("submit", photos.file, "--pinned")
    assert code == 0, lines
    assert api_server.get("TransferJob", "flowers")["metadata"]["annotations"][DATASET] == dataset
