"""The check of a storage before any work: what a server lacks is reported at once, or topwork does without it."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from tests.faults import proxy as faults
from tests.faults.proxy import Exchange, Fault, Proxy, Request, Response, run_proxy

from topwork.artifacts import download_artifact, write_artifact
from topwork.clients.s3.errors import AccessError
from topwork.clients.s3.storage import Storage, StorageSettings, describe_file
from topwork.clients.s3.storage_check import check_storage
from topwork.errors import SettingError, UnavailableError

MEBIBYTE = 1 << 20


@pytest.fixture
def proxy(s3_settings: StorageSettings) -> Iterator[Proxy]:
    with run_proxy(str(s3_settings.endpoint_url)) as running:
        yield running


@pytest.fixture
def behind(storage: Storage, s3_settings: StorageSettings, proxy: Proxy) -> Callable[..., Storage]:
    """Function that returns a storage whose server answers matching requests in its own way."""

    def make(respond: Callable[[Exchange], None], matches: Callable[[Request], bool]) -> Storage:
        proxy.set_fault(Fault("server", respond, matches))
        settings = replace(s3_settings, endpoint_url=proxy.endpoint, attempts=2, part_bytes=5 * MEBIBYTE)
        return Storage(storage.uri, settings)

    return make


def deletes_batch(request: Request) -> bool:
    return request.method == "POST" and "?delete" in request.path


def deletes_batch_without_md5(request: Request) -> bool:
    return deletes_batch(request) and "Content-MD5" not in request.headers


def is_conditional(request: Request) -> bool:
    return request.method == "PUT" and "If-None-Match" in request.headers


def completes_upload(request: Request) -> bool:
    return request.method == "POST" and "uploadId=" in request.path


def ignore_condition(exchange: Exchange) -> None:
    """Act like a server that does not know the header If-None-Match: it replaces the object."""
    response = exchange.server.forward(exchange.request_received)
    if response.status == 412:
        body = b"<CompleteMultipartUploadResult><ETag>x</ETag></CompleteMultipartUploadResult>"
        response = Response(200, [("ETag", '"x"')], body if exchange.command == "POST" else b"")
    exchange.respond(response)


def test_check_leaves_nothing_behind_and_needs_few_requests(behind: Callable[..., Storage], proxy: Proxy) -> None:
    steps: list[str] = []
    checked = behind(faults.reset, lambda _: False)
    check_storage(checked, lambda name, seconds: steps.append(name))
    assert steps == [
        "put", "conditional put (If-None-Match: *)", "get", "multipart upload", "abort of a multipart upload", "list",
        "delete", "head",
    ]  # fmt: skip
    assert len(proxy.requests) == 13
    assert list(checked.list()) == []
    assert checked.multipart_uploads.abort_incomplete(older_than_seconds=0) == 0
    assert checked.server.deletion.mode == "batch"


def test_concurrent_checks_do_not_disturb_each_other(storage: Storage) -> None:
    storage.write(".topwork-check/of-another-process", b"in use")
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: check_storage(storage), range(8)))
    assert [item.key for item in storage.list()] == [".topwork-check/of-another-process"]


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (400, "MissingContentMD5"),
        (400, "InvalidRequest"),
        (400, "MalformedXML"),
        (405, "MethodNotAllowed"),
        (411, "MissingContentLength"),
        (501, "NotImplemented"),
    ],
)
def test_server_without_batches_deletes_objects_one_by_one(
    behind: Callable[..., Storage], storage: Storage, status: int, code: str
) -> None:
    limited = behind(faults.error(status, code, "Not here."), deletes_batch)
    check_storage(limited)
    assert limited.server.deletion.mode == "single"
    for key in ("a", "b", "with space/ä+b"):
        storage.write(key, b"x")
    limited.delete(["a", "missing", "b", "with space/ä+b"])
    assert list(storage.list()) == []


def test_server_that_requires_content_md5_still_deletes_in_batches(
    behind: Callable[..., Storage], storage: Storage, proxy: Proxy
) -> None:
    missing = faults.error(400, "MissingContentMD5", "Missing required header for this request: Content-Md5.")
    strict = behind(missing, deletes_batch_without_md5)
    for key in ("a", "b"):
        storage.write(key, b"x")
    strict.delete(["a", "b", "missing"])
    assert strict.server.deletion.mode == "batch with Content-MD5"
    assert list(storage.list()) == []
    assert [request.method for request in proxy.requests] == ["POST", "POST"]


def test_key_that_fails_in_a_batch_is_deleted_on_its_own(behind: Callable[..., Storage], storage: Storage) -> None:
    failing = behind(batch_errors(storage, {"a": "InternalError", "gone": "NoSuchKey"}), deletes_batch)
    storage.write("a", b"x")
    failing.delete(["a", "gone"])
    assert storage.read("a") is None


def test_key_that_can_not_be_deleted_does_not_stop_the_others(behind: Callable[..., Storage], storage: Storage) -> None:
    failing = behind(batch_errors(storage, {"locked": "AccessDenied", "a": "InternalError"}), deletes_batch)
    storage.write("a", b"x")
    with pytest.raises(AccessError, match=rf"denied access to {storage.uri}/locked \(AccessDenied: Reason\.\)"):
        failing.delete(["locked", "a"])
    assert storage.read("a") is None


def batch_errors(storage: Storage, codes: dict[str, str]) -> Callable[[Exchange], None]:
    """Respond to DeleteObjects with status 200 and an error for each key."""
    errors = "".join(
        f"<Error><Key>{storage.target(key)['Key']}</Key><Code>{code}</Code><Message>Reason.</Message></Error>"
        for key, code in codes.items()
    )
    body = f"<?xml version='1.0'?><DeleteResult>{errors}</DeleteResult>".encode()
    return lambda exchange: exchange.respond(Response(200, [("Content-Type", "application/xml")], body))


@pytest.mark.parametrize(
    ("respond", "reason"),
    [
        (faults.error(501, "NotImplemented", "No."), "NotImplemented: No."),
        (faults.error(400, "InvalidArgument", "No."), "InvalidArgument: No."),
        (ignore_condition, "the server ignores the condition and replaces an existing object"),
        (faults.error(412, "PreconditionFailed", "No."), "the server refuses to create a new object"),
    ],
    ids=["501", "400", "ignored", "always-412"],
)
def test_server_without_conditional_writes_is_rejected(
    behind: Callable[..., Storage], proxy: Proxy, respond: Callable[[Exchange], None], reason: str
) -> None:
    limited = behind(respond, is_conditional)
    with pytest.raises(SettingError) as caught:
        check_storage(limited)
    assert str(caught.value) == (
        f"{limited.uri} at {proxy.endpoint} can't be used:\n"
        f"- conditional put (If-None-Match: *) failed ({reason}). topwork needs it to let only one of several writers "
        "publish a model version or a dataset. Use a server or a version of it that supports conditional writes."
    )
    assert list(limited.list()) == []


@pytest.mark.parametrize(
    ("operation", "matches"),
    [
        ("put", lambda request: request.method == "PUT"),
        ("get", lambda request: request.method == "GET" and request.is_object),
        ("list", lambda request: request.method == "GET" and "list-type=2" in request.path),
        ("multipart upload", lambda request: request.method == "POST" and "?uploads" in request.path),
        ("multipart upload", completes_upload),
        ("abort of a multipart upload", lambda request: request.method == "DELETE" and "uploadId" in request.path),
        ("delete", lambda request: request.method == "DELETE" and "uploadId" not in request.path),
        ("delete", deletes_batch),
        ("head", lambda request: request.method == "HEAD"),
    ],
)
def test_missing_permission_is_reported_for_its_operation(
    behind: Callable[..., Storage], operation: str, matches: Callable[[Request], bool]
) -> None:
    restricted = behind(faults.error(403, "AccessDenied", "Access Denied."), matches)
    with pytest.raises(AccessError) as caught:
        check_storage(restricted)
    lines = str(caught.value).splitlines()
    assert f"- {operation} failed (" in lines[1]
    assert caught.value.exit_code == 75


def test_several_missing_operations_are_reported_together(behind: Callable[..., Storage]) -> None:
    denied = faults.error(403, "AccessDenied", "Access Denied.")
    restricted = behind(denied, lambda request: request.method == "DELETE" or "list-type=2" in request.path)
    with pytest.raises(AccessError) as caught:
        check_storage(restricted)
    failed = [line.split(" failed ")[0] for line in str(caught.value).splitlines()[1:]]
    assert failed == ["- abort of a multipart upload", "- list", "- delete", "- head"]


def test_bucket_that_keeps_deleted_objects_is_rejected(behind: Callable[..., Storage]) -> None:
    ok = Response(204, [], b"")
    locked = behind(
        lambda exchange: exchange.respond(ok if exchange.command == "DELETE" else replace(ok, status=200)),
        lambda request: (request.method == "DELETE" and "uploadId" not in request.path) or deletes_batch(request),
    )
    with pytest.raises(SettingError, match="the object still exists after it was deleted"):
        check_storage(locked)


def test_missing_bucket_and_unavailable_server_are_reported_as_such(
    behind: Callable[..., Storage], s3_settings: StorageSettings
) -> None:
    with pytest.raises(SettingError, match=r"^The bucket no-such-bucket does not exist"):
        check_storage(Storage("s3://no-such-bucket/x", s3_settings))
    with pytest.raises(UnavailableError, match="after all retries"):
        check_storage(behind(faults.error(503, "SlowDown", "Later."), lambda _: True))


@pytest.mark.parametrize(
    ("status", "code"), [(501, "NotImplemented"), (400, "InvalidArgument"), (403, "SignatureDoesNotMatch")]
)
def test_server_without_checksums_is_used_without_them(
    behind: Callable[..., Storage], tmp_path: Path, status: int, code: str
) -> None:
    def has_checksum(request: Request) -> bool:
        return request.method in {"PUT", "POST"} and "checksum" in " ".join(request.headers).lower()

    limited = behind(faults.error(status, code, "No."), lambda r: has_checksum(r) and not deletes_batch(r))
    check_storage(limited)
    assert limited.server.uses_checksums is False
    for size in (5, 11 * MEBIBYTE):
        (tmp_path / "file").write_bytes(bytes(size))
        entry = describe_file(tmp_path / "file")
        assert limited.at(limited.uri).create(tmp_path / "file", f"created-{size}", entry) is True
        assert limited.upload(tmp_path / "file", f"uploaded-{size}") == entry
        assert limited.download(f"created-{size}", tmp_path / "copy", entry) == entry


def test_file_that_is_too_large_for_one_request_is_stored_in_parts(
    behind: Callable[..., Storage], tmp_path: Path
) -> None:
    def is_large_put(request: Request) -> bool:
        return "If-None-Match" in request.headers and int(request.headers["Content-Length"]) > 11 * MEBIBYTE

    limited = behind(faults.error(413, "EntityTooLarge", "Your proposed upload is too large."), is_large_put)
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "weights").write_bytes(bytes(12 * MEBIBYTE))
    manifest = write_artifact(limited, "model", tmp_path / "files", {})
    assert download_artifact(limited, "model", tmp_path / "copy") == manifest
    assert limited.size("model/weights") == 12 * MEBIBYTE


def test_reason_is_reported_if_only_the_response_to_head_lacks_it(behind: Callable[..., Storage]) -> None:
    requests: list[str] = []

    def follows_head(request: Request) -> bool:
        requests.append(request.method)
        return "HEAD" in requests

    with pytest.raises(AccessError, match="Set the clock of this machine"):
        check_storage(behind(faults.error(403, "RequestTimeTooSkewed", "Too far."), follows_head))
