"""Storage operations during faults: a single fault is retried, and a permanent one fails within a time limit."""

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from tests.faults import proxy as faults
from tests.faults.proxy import Fault, Proxy

from topwork.clients.s3.errors import AccessError
from topwork.clients.s3.stall_detection import StallDetector
from topwork.clients.s3.storage import FileEntry, Storage, StorageSettings
from topwork.errors import SettingError, TopworkError, UnavailableError
from topwork.registry import versions
from topwork.registry.versions import Version

LONG = bool(os.environ.get("TOPWORK_LONG"))
DATA = os.urandom(300_000)
# Attempts of s3transfer for one part of a download, each of which is a request with its own retries.
DOWNLOAD_ATTEMPTS = 5

Operation = Callable[[Storage, Path, FileEntry], object]
OPERATIONS: dict[str, Operation] = {
    "list": lambda storage, directory, entry: [item.key for item in storage.list()],
    "size": lambda storage, directory, entry: storage.size("existing"),
    "read": lambda storage, directory, entry: storage.read("existing") == DATA,
    "read missing object": lambda storage, directory, entry: storage.read("missing"),
    "write": lambda storage, directory, entry: storage.write("new", DATA),
    "upload": lambda storage, directory, entry: storage.upload(directory / "file", "new") == entry,
    "download": lambda storage, directory, entry: (
        storage.download("existing", directory / "downloaded", entry) == entry
    ),
    "delete": lambda storage, directory, entry: storage.delete(["missing"]),
}
FAULTS = [
    Fault("refuse", faults.refuse),
    Fault("reset", faults.reset),
    Fault("lost response", faults.lost_response),
    Fault("stall", faults.stall, is_silent=True),
    Fault("stalled body", faults.stalled_body, is_silent=True),
    Fault("slow body", faults.slow_body, is_silent=True),
    Fault("truncate", faults.truncate),
    Fault("corrupt request", faults.corrupt_request),
    Fault("busy", faults.error(503, "SlowDown", "Please reduce your request rate.")),
]


@pytest.fixture
def entry(storage: Storage, tmp_path: Path) -> FileEntry:
    (tmp_path / "file").write_bytes(DATA)
    return storage.upload(tmp_path / "file", "existing")


@pytest.fixture
def faulty_storage(storage: Storage, s3_settings: StorageSettings, proxy: Proxy) -> Callable[[Fault], Storage]:
    """Function that starts a fault and returns storage behind the proxy."""

    def start(fault: Fault) -> Storage:
        proxy.set_fault(fault)
        return Storage(storage.uri, proxy.settings(s3_settings))

    return start


# s3transfer does not close a failed connection, which the garbage collector then reports.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
@pytest.mark.parametrize(
    "operation", list(OPERATIONS) if LONG else ["read", "read missing object", "upload", "download"]
)
def test_single_fault_is_retried_and_a_permanent_one_fails_in_time(
    operation, fault, storage, faulty_storage, entry, proxy, tmp_path
):
    expected = OPERATIONS[operation](storage, tmp_path, entry)
    assert OPERATIONS[operation](faulty_storage(fault.once()), tmp_path, entry) == expected
    assert proxy.fault_count == 1
    faulty, started = faulty_storage(fault), time.monotonic()
    try:
        # Faults in the body do not affect responses without a body.
        assert OPERATIONS[operation](faulty, tmp_path, entry) == expected
    except UnavailableError as error:
        assert "s3://" in str(error)
    elapsed = time.monotonic() - started
    assert elapsed < 3 * faults.ATTEMPTS * DOWNLOAD_ATTEMPTS * faults.SILENT_TIMEOUT_SECONDS, elapsed


@pytest.mark.parametrize(
    ("response", "message"),
    [
        (faults.error(400, "ExpiredToken", "It has expired."), "AWS_SESSION_TOKEN"),
        (faults.error(403, "RequestTimeTooSkewed", "Too far."), "Set the clock of this machine"),
        (faults.error(403, "InvalidAccessKeyId", "Who?"), "does not know the access key"),
    ],
)
def test_errors_of_head_requests_are_reported_with_their_cause(faulty_storage, entry, tmp_path, response, message):
    rejected = faulty_storage(Fault("rejected", response))
    for operation in ("size", "upload", "download"):
        with pytest.raises(AccessError, match=message) as caught:
            OPERATIONS[operation](rejected, tmp_path, entry)
        assert caught.value.exit_code == 75


# Status and code of a response, the exit code, and whether the request is retried before that. AccessDenied and the
# like are not retried with the same credentials: see tests/storage/test_credentials.py.
STATUSES = [
    (301, "PermanentRedirect", 2, False),
    (307, "TemporaryRedirect", 75, True),
    (400, "AuthorizationHeaderMalformed", 2, False),
    (400, "InvalidArgument", 2, False),
    (400, "RequestTimeout", 75, True),
    (401, "Unauthorized", 75, False),
    (403, "AccessDenied", 75, False),
    (403, "AllAccessDisabled", 75, False),
    (403, "SignatureDoesNotMatch", 75, False),
    (404, "NoSuchBucket", 2, False),
    (405, "MethodNotAllowed", 2, False),
    (408, "RequestTimeout", 75, True),
    (425, "TooEarly", 75, True),
    (429, "TooManyRequests", 75, True),
    (429, "SlowDown", 75, True),
    (500, "InternalError", 75, True),
    (501, "NotImplemented", 2, False),
    (502, "BadGateway", 75, True),
    (503, "SlowDown", 75, True),
    (504, "GatewayTimeout", 75, True),
    (507, "InsufficientStorage", 75, False),
    (509, "BandwidthLimitExceeded", 75, True),
    (520, "UnknownError", 75, True),
    (522, "", 75, True),
    (530, "", 75, True),
]


@pytest.mark.parametrize(("status", "code", "exit_code", "is_retried"), STATUSES)
def test_status_decides_about_retries_and_the_exit_code(
    faulty_storage, proxy, monkeypatch, status, code, exit_code, is_retried
):
    monkeypatch.setattr("botocore.endpoint.time", SimpleNamespace(sleep=lambda seconds: None))
    # Without a code: an HTML page of a proxy in front of the server.
    response = faults.error(status, code, "Message.") if code else html_page(status)
    fault = Fault(str(status), response, lambda request: request.method in {"PUT", "GET"} and request.is_object)
    once = faulty_storage(fault.once())
    if is_retried:
        assert once.write("key", b"value") is True
        assert faulty_storage(fault.once()).read("key") == b"value"
    failing = faulty_storage(fault)
    for operation in (lambda: failing.write("key", b"value"), lambda: failing.read("key")):
        with pytest.raises(TopworkError) as caught:
            operation()
        assert caught.value.exit_code == exit_code
        assert failing.uri in str(caught.value) or proxy.endpoint in str(caught.value)
    assert proxy.fault_count == 2 * (faults.ATTEMPTS if is_retried else 1)


def html_page(status: int) -> Callable[[faults.Exchange], None]:
    def inject(exchange: faults.Exchange) -> None:
        exchange.respond(faults.Response(status, [("Content-Type", "text/html")], b"<html><br>Origin is down.</html>"))

    return inject


@pytest.mark.parametrize(("code", "kind"), [("InsufficientStorage", UnavailableError), ("QuotaExceeded", SettingError)])
def test_full_server_is_reported_with_the_fix(faulty_storage, proxy, code, kind):
    full = faulty_storage(Fault("full", faults.error(507 if kind is UnavailableError else 403, code, "No space.")))
    with pytest.raises(TopworkError) as caught:
        full.write("new", DATA)
    assert type(caught.value) is kind
    assert str(caught.value) == (
        f"{proxy.endpoint} has no space left for {full.uri}/new ({code}: No space.). Delete data that is no longer "
        "needed (topwork gc STORAGE) or increase the disk or quota, then start again."
    )


def test_slow_but_steady_response_is_not_aborted(storage, faulty_storage, proxy):
    storage.write("slow", bytes(8 * (1 << 18)))

    def respond_slowly(exchange: faults.Exchange) -> None:
        response = exchange.server.forward(exchange.request_received)
        exchange.respond(response, body=b"")
        for piece in range(8):  # two seconds in total, twice the timeout
            exchange.wfile.write(response.body[piece << 18 : (piece + 1) << 18])
            exchange.wfile.flush()
            time.sleep(0.25)

    assert faulty_storage(Fault("slow", respond_slowly, is_silent=True)).read("slow") == bytes(8 * (1 << 18))
    assert proxy.fault_count == 1


def test_moving_latest_fails_if_storage_does_not_return_written_objects(storage, faulty_storage):
    version = Version(
        name="cats", version=1, uri="s3://…", run="cats-1", weights="0" * 64, published="2026-01-01T00:00:00Z",
        main_metric="accuracy", metrics={}, split="test", images=1,
    )  # fmt: skip
    manifest = {"format": 1, "files": {}, "facts": version.model_dump(mode="json")}
    storage.write("models/cats/1/manifest.json", json.dumps(manifest).encode())
    missing = faults.error(404, "NoSuchKey", "Not yet.")
    stale = Fault("stale", missing, lambda request: request.method == "GET" and "latest.json" in request.path)
    with pytest.raises(UnavailableError, match="100 times in a row"):
        versions.update_latest(faulty_storage(stale), "cats")


def test_stall_detection_continues_after_an_unexpected_error():
    class BrokenResponse:
        closed, length_remaining = False, 10
        is_broken = False

        def tell(self) -> int:
            if self.is_broken:
                raise TypeError("a response that nobody expected")
            return 0

    detector, broken = StallDetector(None, 0.2), BrokenResponse()
    errors: list[threading.ExceptHookArgs] = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(threading, "excepthook", errors.append)
        detector._watch(broken)
        thread = detector._thread
        broken.is_broken = True
        thread.join()
    assert [error.exc_type for error in errors] == [TypeError]
    working = BrokenResponse()
    detector._watch(working)
    assert detector._thread is not None
    assert detector._thread.is_alive()
    working.closed = True
    detector._thread.join()
