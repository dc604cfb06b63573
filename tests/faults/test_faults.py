"""Every fault of storage at every stage: how the stage ends, what it says, and that nothing is half visible after.

Each row of the table that is printed is a stage that met a fault, from one of its requests on, for once or for ever;
a clean run of the stage follows. TOPWORK_LONG=1 lets each fault begin at several requests of a stage.
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
from topwork.clients.s3.storage import Storage, StorageSettings
from topwork.spec import TransferJob
from topwork.workspace import Workspace

LONG = bool(os.environ.get("TOPWORK_LONG"))
SEED = int(os.environ.get("TOPWORK_SEED", "5"))
STAGES: dict[str, Callable[[TransferJob, Workspace], Any]] = {
    "pull": pipeline.run_pull,
    "transfer": pipeline.run_transfer,
    "fine-tune": pipeline.run,  # and publish
}


def is_file(request: Request) -> bool:
    """Whether an object is read that is no mark of what is done."""
    return request.method == "GET" and request.is_object and not request.path.endswith((".json", ".yaml"))


def is_read(request: Request) -> bool:
    return request.method == "GET" and request.is_object


def is_answered(request: Request) -> bool:
    return request.method == "GET"


def is_written(request: Request) -> bool:
    return request.method in {"PUT", "POST"}


@dataclass(frozen=True)
class Case:
    """A fault, the exit code of a stage that meets it for ever, and one word of what the user is told.

    Attributes:
        passes: Whether a stage gets over it when it comes once.
    """

    fault: Fault
    code: int
    told: str
    passes: bool = True


S3 = faults.error
CASES = [
    Case(Fault("connection refused", faults.refuse), 75, "can't be reached"),
    Case(Fault("connection reset", faults.reset), 75, "can't be reached"),
    Case(Fault("answer lost", faults.lost_answer), 75, "can't be reached"),
    Case(Fault("500 InternalError", S3(500, "InternalError", "Try again.")), 75, "failed for"),
    Case(Fault("503 SlowDown", S3(503, "SlowDown", "Please reduce your request rate.")), 75, "failed for"),
    Case(Fault("403 AccessDenied", S3(403, "AccessDenied", "Access Denied.")), 2, "AWS_ACCESS_KEY_ID", passes=False),
    Case(Fault("404 NoSuchKey", S3(404, "NoSuchKey", "No such key."), is_file), 2, "", passes=False),
    Case(
        Fault("clock skew", S3(403, "RequestTimeTooSkewed", "The difference is too large.")), 2, "clock", passes=False
    ),
    Case(
        Fault("expired credentials", S3(400, "ExpiredToken", "The token has expired.")),
        2,
        "AWS_SESSION_TOKEN",
        passes=False,
    ),
    Case(Fault("truncated body", faults.truncate, is_answered), 75, ""),
    Case(Fault("corrupted body", faults.corrupt_answer, is_read), 75, ""),
    Case(Fault("corrupted upload", faults.corrupt_request, is_written), 75, "failed for"),
    Case(Fault("stall", faults.stall, is_silent=True), 75, "can't be reached"),
    Case(Fault("stall in a body", faults.stalled_body, is_answered, is_silent=True), 75, "can't be reached"),
    Case(Fault("trickling body", faults.trickle, is_answered, is_silent=True), 75, "can't be reached"),
    Case(Fault("bucket gone", S3(404, "NoSuchBucket", "Gone.")), 2, "does not exist", passes=False),
    Case(
        Fault("server's disk full", S3(507, "InsufficientStorage", "No space."), is_written),
        75,
        "no room left",
        passes=False,
    ),
]


@dataclass(frozen=True)
class Undisturbed:
    """What an undisturbed run leaves and asks.

    Attributes:
        objects: All objects after each stage, and before the first one, which is named "".
        requests: Those of each stage.
    """

    objects: dict[str, dict[str, bytes]]
    requests: dict[str, list[Request]]


@pytest.fixture(scope="module")
def undisturbed(
    small_job: TransferJob, s3_settings: StorageSettings, tmp_path_factory: pytest.TempPathFactory
) -> Undisturbed:
    found = Undisturbed({"": {}}, {})
    uri = f"s3://{BUCKET}/{uuid.uuid4().hex[:8]}"
    direct = Storage(uri, s3_settings)
    with faults.proxy_before(str(s3_settings.endpoint_url)) as proxy:
        seen = Storage(uri, proxy.settings(s3_settings))
        for name, stage in STAGES.items():
            proxy.play(None)
            stage(small_job, _workspace(seen, tmp_path_factory.mktemp(name)))
            found.requests[name] = proxy.seen
            found.objects[name] = {stored.key: direct.read(stored.key) or b"" for stored in direct.list()}
    return found


def _workspace(storage: Storage, scratch: Path) -> Workspace:
    return Workspace(storage=storage, metrics=Metrics(), progress=NoProgress(), scratch=scratch)


class Place:
    """Storage of its own in which the stages before one are done; reached through the proxy, or past it."""

    def __init__(self, before: dict[str, bytes], settings: StorageSettings, proxy: Proxy, folder: Path) -> None:
        self.uri, self._settings, self._proxy = f"s3://{BUCKET}/{uuid.uuid4().hex[:8]}", settings, proxy
        self._folder = folder
        self.direct = Storage(self.uri, settings)
        for key, data in before.items():
            self.direct.write(key, data)

    def run(self, stage: str, job: TransferJob) -> tuple[int, str]:
        """Run a stage on empty scratch; gives exit code and message."""
        scratch = self._folder / uuid.uuid4().hex[:8]
        scratch.mkdir()
        storage = Storage(self.uri, self._proxy.settings(self._settings))
        try:
            STAGES[stage](job, _workspace(storage, scratch))
        except Exception as error:
            known = to_topwork_error(error)
            if known is None:
                raise
            return known.exit_code, str(known)
        return 0, ""


def check_nothing_is_half_visible(storage: Storage) -> None:
    """Every manifest stands for files that are whole, and every pointer and mark for what is there."""
    for stored in list(storage.list()):
        folder, _, name = stored.key.rpartition("/")
        if name == MANIFEST:
            manifest = read_manifest(storage, folder)
            assert manifest is not None
            for file, entry in manifest.files.items():
                data = storage.read(f"{folder}/{file}")
                assert data is not None, f"{stored.key} names {file}, which is not there"
                assert (len(data), hashlib.sha256(data).hexdigest()) == (entry.size, entry.sha256), file
        elif name == "latest.json":
            version = json.loads(storage.read(stored.key) or b"")["version"]
            assert storage.size(f"{folder}/{version}/{MANIFEST}")
        elif name == "done.json":
            done = json.loads(storage.read(stored.key) or b"")
            named = [done[key] for key in ("key",) if key in done]
            named += [f"{done['dataset']}/{MANIFEST}"] if "dataset" in done else []
            assert all(storage.size(key) for key in named), stored.key


def without_content(key: str) -> str:
    """Name a model by its stage alone: its own name tells its content, which holds the time."""
    return re.sub(r"model-[0-9a-f]{16}\.keras", "model", key)


def check_holds_what_it_should(storage: Storage, expected: dict[str, bytes]) -> None:
    """The keys of an undisturbed run and no other, and its bytes where they depend on the job alone."""
    found = {stored.key for stored in storage.list()}
    assert sorted(map(without_content, found)) == sorted(map(without_content, expected))
    for key in found:
        if key.startswith("datasets/") or key.endswith("spec.yaml"):
            assert storage.read(key) == expected[key], key
    uploads = storage._client.list_multipart_uploads(Bucket=BUCKET, Prefix=storage._key_prefix).get("Uploads", [])
    assert uploads == []


@pytest.fixture
def row(capsys: pytest.CaptureFixture[str]) -> Callable[..., None]:
    """Print a row of the table past pytest."""

    def told(stage: str, fault: str, where: str, code: int, seconds: float, said: str) -> None:
        with capsys.disabled():
            print(f"{stage:<9} {fault:<19} {where:<11} {code:>3} {seconds:>6.1f} s  {said[:120]}", flush=True)

    with capsys.disabled():
        print(f"\n{'stage':<9} {'fault':<19} {'requests':<11} exit   took  said")
    return told


class Bench:
    """One stage under all its faults."""

    def __init__(self, stage: str, job: TransferJob, proxy: Proxy, row: Callable[..., None]) -> None:
        self.stage, self.job, self.proxy, self.row = stage, job, proxy, row

    def play(self, place: Place, case: Case, fault: Fault, where: str) -> int:
        """Let the stage meet a fault; gives its exit code."""
        self.proxy.play(fault)
        started = time.monotonic()
        code, said = place.run(self.stage, self.job)
        self.row(self.stage, fault.name, where, code, time.monotonic() - started, said)
        hit = self.proxy.hits
        self.proxy.play(None)
        assert hit, "the fault came too late"
        if code:
            assert code == case.code, said
            assert case.told in said, said
            assert "\n" not in said, said
            assert "s3://" in said or "http://" in said, said
        check_nothing_is_half_visible(place.direct)
        return code


@pytest.fixture
def bench_of(small_job, proxy, row) -> Callable[[str], Bench]:
    return lambda stage: Bench(stage, small_job, proxy, row)


@pytest.fixture
def place_after(undisturbed, s3_settings, proxy, tmp_path) -> Callable[[str], Place]:
    """Make a place where all stages up to one are done."""
    return lambda stage: Place(undisturbed.objects[stage], s3_settings, proxy, tmp_path)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.fault.name)
@pytest.mark.parametrize("stage", list(STAGES))
def test_a_stage_that_meets_a_fault_says_so_and_leaves_storage_whole(stage, case, undisturbed, place_after, bench_of):
    before = {"pull": "", "transfer": "pull", "fine-tune": "transfer"}[stage]
    bench, count = bench_of(stage), sum(map(case.fault.hits, undisturbed.requests[stage]))
    chosen = random.Random(f"{SEED} {stage} {case.fault.name}")
    for first in sorted({0, count // 2, count - 1}) if LONG else [chosen.randrange(count)]:
        place = place_after(before)
        # What only saves work, such as a checkpoint beside training, may fail without the stage.
        bench.play(place, case, case.fault.always(first), f"{first + 1}- of {count}")
        if case.passes:
            assert bench.play(place, case, case.fault.once(), f"1 of {count}") == 0
        if LONG or not case.passes:
            assert place.run(stage, bench.job) == (0, "")
        check_holds_what_it_should(place.direct, undisturbed.objects[stage])


@pytest.mark.parametrize(
    ("stage", "hidden"),
    [
        ("pull", ("/pull/done.json", "/manifest.json")),
        # It looks before it clears leftovers, before it trains, and before it stores what it has trained.
        ("transfer", ("/transfer/done.json",) * 2),
        ("transfer", ("/transfer/done.json",) * 3),
        ("fine-tune", ("/fine-tune/done.json",) * 2),
        ("fine-tune", ("/fine-tune/done.json",) * 3),
        ("fine-tune", ("/publish/done.json",)),
    ],
)
def test_a_second_process_that_began_before_the_first_was_done_changes_nothing(
    stage, hidden, small_job, place_after, proxy
):
    place = place_after(stage)
    before = {stored.key: stored.etag for stored in place.direct.list()}
    # Each mark is not there yet when it is looked for first, and there when the same work is done once more.
    missing = Fault(
        "not there yet", S3(404, "NoSuchKey", "No such key."), lambda request: request.path.endswith(hidden)
    )
    proxy.play(replace(missing, times=len(hidden)))
    assert place.run(stage, small_job) == (0, "")
    assert proxy.hits == len(hidden)
    assert {stored.key: stored.etag for stored in place.direct.list()} == before
