"""Every use of storage under every fault: got over when it comes once, and ended in time when it stays."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.faults import proxy as faults
from tests.faults.proxy import Fault, Proxy

from topwork.clients.s3.storage import FileEntry, Storage, StorageSettings
from topwork.errors import SettingError, TopworkError, UnavailableError
from topwork.registry import versions
from topwork.registry.versions import Version

LONG = bool(os.environ.get("TOPWORK_LONG"))
DATA = os.urandom(300_000)
# Tries of s3transfer for one part of a download, each a request with its own.
DOWNLOADS = 5

Use = Callable[[Storage, Path, FileEntry], object]
USES: dict[str, Use] = {
    "list": lambda storage, folder, entry: [found.key for found in storage.list()],
    "size": lambda storage, folder, entry: storage.size("there"),
    "read": lambda storage, folder, entry: storage.read("there") == DATA,
    "read what is missing": lambda storage, folder, entry: storage.read("missing"),
    "write": lambda storage, folder, entry: storage.write("new", DATA),
    "upload": lambda storage, folder, entry: storage.upload(folder / "file", "new") == entry,
    "download": lambda storage, folder, entry: storage.download("there", folder / "fetched", entry) == entry,
    "delete": lambda storage, folder, entry: storage.delete(["nothing"]),
}
FAULTS = [
    Fault("refuse", faults.refuse),
    Fault("reset", faults.reset),
    Fault("lost answer", faults.lost_answer),
    Fault("stall", faults.stall, is_silent=True),
    Fault("stalled body", faults.stalled_body, is_silent=True),
    Fault("trickle", faults.trickle, is_silent=True),
    Fault("truncate", faults.truncate),
    Fault("corrupt request", faults.corrupt_request),
    Fault("busy", faults.error(503, "SlowDown", "Please reduce your request rate.")),
]


@pytest.fixture
def entry(storage: Storage, tmp_path: Path) -> FileEntry:
    (tmp_path / "file").write_bytes(DATA)
    return storage.upload(tmp_path / "file", "there")


@pytest.fixture
def through(storage: Storage, s3_settings: StorageSettings, proxy: Proxy) -> Callable[[Fault], Storage]:
    """Let the proxy play a fault, and give storage behind it."""

    def played(fault: Fault) -> Storage:
        proxy.play(fault)
        return Storage(storage.uri, proxy.settings(s3_settings))

    return played


# s3transfer leaves a connection that failed to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
@pytest.mark.parametrize("use", list(USES) if LONG else ["read", "read what is missing", "upload", "download"])
def test_a_fault_is_got_over_once_and_ends_in_time_when_it_stays(use, fault, storage, through, entry, proxy, tmp_path):
    expected = USES[use](storage, tmp_path, entry)
    assert USES[use](through(fault.once()), tmp_path, entry) == expected
    assert proxy.hits == 1
    faulty, started = through(fault), time.monotonic()
    try:
        # What has no body has none that is damaged.
        assert USES[use](faulty, tmp_path, entry) == expected
    except UnavailableError as error:
        assert "s3://" in str(error)
    took = time.monotonic() - started
    assert took < 3 * faults.ATTEMPTS * DOWNLOADS * faults.SILENT_SECONDS, took


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (faults.error(400, "ExpiredToken", "It has expired."), "AWS_SESSION_TOKEN"),
        (faults.error(403, "RequestTimeTooSkewed", "Too far."), "Set the clock of this machine"),
        (faults.error(403, "InvalidAccessKeyId", "Who?"), "does not know the access key"),
    ],
)
def test_a_question_whose_answer_has_no_body_learns_why_it_was_refused(through, entry, tmp_path, answer, said):
    refused = through(Fault("refused", answer))
    for use in ("size", "upload", "download"):
        with pytest.raises(SettingError, match=said):
            USES[use](refused, tmp_path, entry)


@pytest.mark.parametrize(("code", "kind"), [("InsufficientStorage", UnavailableError), ("QuotaExceeded", SettingError)])
def test_a_server_without_room_says_what_to_do(through, proxy, code, kind):
    full = through(Fault("full", faults.error(507 if kind is UnavailableError else 403, code, "No room.")))
    with pytest.raises(TopworkError) as caught:
        full.write("new", DATA)
    assert type(caught.value) is kind
    assert str(caught.value) == (
        f"{proxy.endpoint} has no room left for {full.uri}/new ({code}: No room.). Delete what nobody needs "
        "(topwork gc STORAGE), or have the disk or the quota enlarged, then start again."
    )


def test_a_body_that_comes_slowly_but_comes_is_not_given_up(storage, through, proxy):
    storage.write("slow", bytes(8 * (1 << 18)))

    def slowly(exchange: faults.Exchange) -> None:
        answer = exchange.server.forwarded(exchange.request_seen)
        exchange.tell(answer, body=b"")
        for piece in range(8):  # two seconds in all, twice the time-out
            exchange.wfile.write(answer.body[piece << 18 : (piece + 1) << 18])
            exchange.wfile.flush()
            time.sleep(0.25)

    assert through(Fault("slow", slowly, is_silent=True)).read("slow") == bytes(8 * (1 << 18))
    assert proxy.hits == 1


def test_publishing_does_not_ask_for_ever_where_storage_does_not_tell_of_what_was_written(storage, through):
    version = Version(
        name="cats", version=1, uri="s3://…", run="cats-1", weights="0" * 64, published="2026-01-01T00:00:00Z",
        main_metric="accuracy", metrics={}, split="test", images=1,
    )  # fmt: skip
    manifest = {"format": 1, "files": {}, "facts": version.model_dump(mode="json")}
    storage.write("models/cats/1/manifest.json", json.dumps(manifest).encode())
    missing = faults.error(404, "NoSuchKey", "Not yet.")
    stale = Fault("stale", missing, lambda request: request.method == "GET" and "latest.json" in request.path)
    with pytest.raises(UnavailableError, match="100 times in a row"):
        versions.move_latest(through(stale), "cats")
