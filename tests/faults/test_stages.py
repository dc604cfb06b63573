"""Every storage fault in every stage: exit code, message, and consistent storage afterward.

Each row of the printed table is a run of a stage with a fault that starts at one of its requests and occurs once or
permanently. A run without faults follows. With TOPWORK_LONG=1, each fault starts at several requests of a stage.
"""

import hashlib
import json
import os
import random
import re
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import BUCKET
from tests.faults import proxy as faults
from tests.faults.proxy import Fault, Proxy, Request

from topwork import pipeline
from topwork.artifacts import MANIFEST_NAME as MANIFEST
from topwork.artifacts import read_manifest
from topwork.cli.output.progress import NoProgress
from topwork.cli.runtime.shutdown import to_topwork_error
from topwork.clients.prometheus.metrics import Metrics
from topwork.clients.s3.storage import PROBE_PREFIX, Storage, StorageSettings
from topwork.spec import TransferJob
from topwork.workspace import Workspace

LONG = bool(os.environ.get("TOPWORK_LONG"))
SEED = int(os.environ.get("TOPWORK_SEED", "5"))
STAGES: dict[str, Callable[[TransferJob, Workspace], Any]] = {
    "pull": pipeline.run_pull,
    "transfer": pipeline.run_transfer,
    "fine-tune": pipeline.run,  # and publish
}


def reads_file(request: Request) -> bool:
    """Whether the request reads an object other than a JSON or YAML file."""
    return request.method == "GET" and request.is_object and not request.path.endswith((".json", ".yaml"))


def reads_object(request: Request) -> bool:
    return request.method == "GET" and request.is_object


def is_get(request: Request) -> bool:
    return request.method == "GET"


def is_write(request: Request) -> bool:
    return request.method in {"PUT", "POST"}


@dataclass(frozen=True)
class Case:
    """A fault, and its effect on a stage.

    Attributes:
        fault: The fault.
        exit_code: Exit code of the stage if the fault is permanent.
        message: Part of the error message.
        is_retried: Whether the stage succeeds if the fault occurs once.
    """

    fault: Fault
    exit_code: int
    message: str
    is_retried: bool = True


s3_error = faults.error
CASES = [
    Case(Fault("connection refused", faults.refuse), 75, "can't be reached"),
    Case(Fault("connection reset", faults.reset), 75, "can't be reached"),
    Case(Fault("response lost", faults.lost_response), 75, "can't be reached"),
    Case(Fault("500 InternalError", s3_error(500, "InternalError", "Try again.")), 75, "failed for"),
    Case(Fault("503 SlowDown", s3_error(503, "SlowDown", "Please reduce your request rate.")), 75, "failed for"),
    Case(
        Fault("403 AccessDenied", s3_error(403, "AccessDenied", "Access Denied.")),
        75,
        "AWS_ACCESS_KEY_ID",
        is_retried=False,
    ),
    Case(Fault("404 NoSuchKey", s3_error(404, "NoSuchKey", "No such key."), reads_file), 2, "", is_retried=False),
    Case(
        Fault("clock skew", s3_error(403, "RequestTimeTooSkewed", "The difference is too large.")),
        75,
        "clock",
        is_retried=False,
    ),
    Case(
        Fault("expired credentials", s3_error(400, "ExpiredToken", "The token has expired.")),
        75,
        "AWS_SESSION_TOKEN",
        is_retried=False,
    ),
    Case(Fault("truncated body", faults.truncate, is_get), 75, ""),
    Case(Fault("corrupted body", faults.corrupt_response, reads_object), 75, ""),
    Case(Fault("corrupted upload", faults.corrupt_request, is_write), 75, "failed for"),
    Case(Fault("stall", faults.stall, is_silent=True), 75, "can't be reached"),
    Case(Fault("stalled body", faults.stalled_body, is_get, is_silent=True), 75, "can't be reached"),
    Case(Fault("slow body", faults.slow_body, is_get, is_silent=True), 75, "can't be reached"),
    Case(Fault("bucket gone", s3_error(404, "NoSuchBucket", "Gone.")), 2, "does not exist", is_retried=False),
    Case(
        Fault("server's disk full", s3_error(507, "InsufficientStorage", "No space."), is_write),
        75,
        "no space left",
        is_retried=False,
    ),
]


@dataclass(frozen=True)
class Baseline:
    """A run without faults.

    Attributes:
        objects: All objects after each stage; the key "" is the state before the first stage.
        requests: The requests of each stage.
    """

    objects: dict[str, dict[str, bytes]]
    requests: dict[str, list[Request]]


@pytest.fixture(scope="module")
def baseline(
    small_job: TransferJob, s3_settings: StorageSettings, tmp_path_factory: pytest.TempPathFactory
) -> Baseline:
    baseline = Baseline({"": {}}, {})
    uri = f"s3://{BUCKET}/{uuid.uuid4().hex[:8]}"
    direct = Storage(uri, s3_settings)
    with faults.run_proxy(str(s3_settings.endpoint_url)) as proxy:
        proxied = Storage(uri, proxy.settings(s3_settings))
        for name, stage in STAGES.items():
            proxy.set_fault(None)
            stage(small_job, create_workspace(proxied, tmp_path_factory.mktemp(name)))
            baseline.requests[name] = proxy.requests
            baseline.objects[name] = {stored.key: direct.read(stored.key) or b"" for stored in direct.list()}
    return baseline


def create_workspace(storage: Storage, scratch: Path) -> Workspace:
    return Workspace(storage=storage, metrics=Metrics(), progress=NoProgress(), scratch=scratch)


class RunStorage:
    """A separate storage in which the previous stages are complete, with and without the proxy."""

    def __init__(self, before: dict[str, bytes], settings: StorageSettings, proxy: Proxy, directory: Path) -> None:
        self.uri, self._settings, self._proxy = f"s3://{BUCKET}/{uuid.uuid4().hex[:8]}", settings, proxy
        self._directory = directory
        self.direct = Storage(self.uri, settings)
        for key, data in before.items():
            self.direct.write(key, data)

    def run(self, stage: str, job: TransferJob) -> tuple[int, str]:
        """Run a stage with an empty scratch directory; returns exit code and message."""
        scratch = self._directory / uuid.uuid4().hex[:8]
        scratch.mkdir()
        storage = Storage(self.uri, self._proxy.settings(self._settings))
        try:
            STAGES[stage](job, create_workspace(storage, scratch))
        except Exception as error:
            failure = to_topwork_error(error)
            if failure is None:
                raise
            return failure.exit_code, str(failure)
        return 0, ""


def assert_consistent(storage: Storage) -> None:
    """Assert that the files of every manifest are complete, and that all referenced objects exist."""
    for stored in list(storage.list()):
        prefix, _, name = stored.key.rpartition("/")
        if name == MANIFEST:
            manifest = read_manifest(storage, prefix)
            assert manifest is not None
            for file, entry in manifest.files.items():
                data = storage.read(f"{prefix}/{file}")
                assert data is not None, f"{stored.key} refers to {file}, which does not exist"
                assert (len(data), hashlib.sha256(data).hexdigest()) == (entry.size, entry.sha256), file
        elif name == "latest.json":
            version = json.loads(storage.read(stored.key) or b"")["version"]
            assert storage.size(f"{prefix}/{version}/{MANIFEST}")
        elif name == "done.json":
            done = json.loads(storage.read(stored.key) or b"")
            assert all(storage.size(key) for key in references_of(stored.key, done)), stored.key


def references_of(key: str, done: dict[str, Any]) -> list[str]:
    """Return the keys of all objects that a `done.json` refers to."""
    if key.startswith("stages/"):
        return [done["key"]]
    stage = key.split("/")[-2]
    if stage == "pull":
        return [f"{done['dataset']}/{MANIFEST}"]
    return (
        [f"models/{done['name']}/{done['version']}/{MANIFEST}"]
        if stage == "publish"
        else [f"stages/{stage}/{done['key']}/done.json"]
    )


def without_digest(key: str) -> str:
    """Remove the digest from the name of a model file: its content includes the time."""
    return re.sub(r"model-[0-9a-f]{16}\.keras", "model", key)


def assert_matches_baseline(storage: Storage, expected: dict[str, bytes]) -> None:
    """Assert that the keys are those of a run without faults, and also the content that depends only on the job."""
    # What a failed storage check leaves behind is deleted by later runs, after a day.
    keys = {stored.key for stored in storage.list() if not stored.key.startswith(f"{PROBE_PREFIX}/")}
    assert sorted(map(without_digest, keys)) == sorted(map(without_digest, expected))
    for key in keys:
        if key.startswith("datasets/") or key.endswith("spec.yaml"):
            assert storage.read(key) == expected[key], key
    uploads = [upload.key for upload in storage.multipart_uploads.list_incomplete(older_than_seconds=0)]
    assert [key for key in uploads if not key.startswith(f"{PROBE_PREFIX}/")] == []


@pytest.fixture
def print_row(capsys: pytest.CaptureFixture[str]) -> Callable[..., None]:
    """Function that prints a row of the table even while pytest captures output."""

    def print_row(stage: str, fault: str, requests: str, code: int, seconds: float, message: str) -> None:
        with capsys.disabled():
            print(f"{stage:<9} {fault:<19} {requests:<11} {code:>3} {seconds:>6.1f} s  {message[:120]}", flush=True)

    with capsys.disabled():
        print(f"\n{'stage':<9} {'fault':<19} {'requests':<11} exit   time  message")
    return print_row


class FaultyStage:
    """A stage that runs with faults."""

    def __init__(self, stage: str, job: TransferJob, proxy: Proxy, print_row: Callable[..., None]) -> None:
        self.stage, self.job, self.proxy, self.print_row = stage, job, proxy, print_row

    def run(self, run_storage: RunStorage, case: Case, fault: Fault, requests: str) -> int:
        """Run the stage with a fault; returns its exit code."""
        self.proxy.set_fault(fault)
        started = time.monotonic()
        code, message = run_storage.run(self.stage, self.job)
        self.print_row(self.stage, fault.name, requests, code, time.monotonic() - started, message)
        fault_count = self.proxy.fault_count
        self.proxy.set_fault(None)
        assert fault_count, "the fault started too late"
        if code:
            assert code == case.exit_code, message
            assert case.message in message, message
            assert "\n" not in message, message
            assert "s3://" in message or "http://" in message, message
        assert_consistent(run_storage.direct)
        return code


@pytest.fixture
def faulty_stage_of(small_job, proxy, print_row) -> Callable[[str], FaultyStage]:
    return lambda stage: FaultyStage(stage, small_job, proxy, print_row)


@pytest.fixture
def storage_after(baseline, s3_settings, proxy, tmp_path) -> Callable[[str], RunStorage]:
    """Function that creates storage in which all stages up to the given one are complete."""
    return lambda stage: RunStorage(baseline.objects[stage], s3_settings, proxy, tmp_path)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.fault.name)
@pytest.mark.parametrize("stage", list(STAGES))
def test_stage_with_faults_reports_them_and_leaves_storage_consistent(
    stage, case, baseline, storage_after, faulty_stage_of
):
    before = {"pull": "", "transfer": "pull", "fine-tune": "transfer"}[stage]
    # Only the first run of a process checks the export formats, which takes one request.
    count = max(1, sum(map(case.fault.matches, baseline.requests[stage])) - 1)
    faulty_stage = faulty_stage_of(stage)
    generator = random.Random(f"{SEED} {stage} {case.fault.name}")
    for first in sorted({0, count // 2, count - 1}) if LONG else [generator.randrange(count)]:
        run_storage = storage_after(before)
        # Optional requests, such as a checkpoint upload, may fail without failing the stage.
        faulty_stage.run(run_storage, case, case.fault.always(first), f"{first + 1}- of {count}")
        if case.is_retried:
            assert faulty_stage.run(run_storage, case, case.fault.once(), f"1 of {count}") == 0
        if LONG or not case.is_retried:
            assert run_storage.run(stage, faulty_stage.job) == (0, "")
        assert_matches_baseline(run_storage.direct, baseline.objects[stage])


PULL_RECORDS = r"/pull/done\.json|/manifest\.json"


@pytest.mark.parametrize(
    ("stage", "records", "hidden_reads"),
    [
        # The stage reads the record of the run, and the manifest as the previous dataset, as the dataset of the source,
        # and before it stores the images.
        ("pull", PULL_RECORDS, 4),
        # The stage reads done.json at its start, after the last epoch, and before it stores the result.
        *(
            (stage, rf"/stages/{stage}/[^/]+/done\.json", reads)
            for stage in STAGES
            if stage != "pull"
            for reads in (1, 2, 3)
        ),
        ("fine-tune", r"/publish/done\.json", 1),
    ],
)
def test_concurrent_second_process_changes_nothing(stage, records, hidden_reads, small_job, storage_after, proxy):
    run_storage = storage_after(stage)
    before = {stored.key: stored.etag for stored in run_storage.direct.list()}
    # Each record is missing at first, and exists when the stage repeats the work.
    missing = Fault(
        "not yet complete",
        s3_error(404, "NoSuchKey", "No such key."),
        lambda request: request.method != "PUT" and re.search(rf"(?:{records})$", request.path) is not None,
    )
    proxy.set_fault(replace(missing, times=hidden_reads))
    assert run_storage.run(stage, small_job) == (0, "")
    assert proxy.fault_count == hidden_reads
    assert {stored.key: stored.etag for stored in run_storage.direct.list()} == before
