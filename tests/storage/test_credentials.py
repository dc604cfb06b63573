"""Credentials that are replaced while a process runs: the request is repeated with the new ones."""

import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from tests.faults import proxy as faults
from tests.faults.proxy import Fault, Proxy, run_proxy

from topwork.clients.s3 import credentials
from topwork.clients.s3.errors import AccessError
from topwork.clients.s3.storage import Storage, StorageSettings
from topwork.errors import UnavailableError
from topwork.redaction import register_secrets


@pytest.fixture(autouse=True)
def no_aws_configuration(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setattr(credentials, "ROTATION_DELAYS_SECONDS", (0.01, 0.01, 0.01))
    yield
    register_secrets((), "storage credentials")


@pytest.fixture
def proxy(s3_settings: StorageSettings) -> Iterator[Proxy]:
    with run_proxy(str(s3_settings.endpoint_url)) as running:
        yield running


@pytest.fixture
def write_credentials(tmp_path: Path, s3_settings: StorageSettings) -> Callable[[str], None]:
    """Function that writes the credentials file, as the kubelet does for a mounted Secret."""

    def write(secret_key: str) -> None:
        (tmp_path / "credentials").write_text(
            f"[default]\naws_access_key_id = {s3_settings.access_key}\naws_secret_access_key = {secret_key}\n"
        )

    return write


def test_rotated_key_in_a_file_is_used_by_a_running_process(
    storage: Storage, s3_settings: StorageSettings, write_credentials: Callable[[str], None], tmp_path: Path
) -> None:
    write_credentials("revoked-secret-key")
    running = Storage(storage.uri, StorageSettings(endpoint_url=s3_settings.endpoint_url))
    with pytest.raises(AccessError, match="AWS_SECRET_ACCESS_KEY"):
        running.read("key")
    write_credentials(str(s3_settings.secret_key))
    assert running.write("key", b"value") is True
    assert running.size("missing") is None
    (tmp_path / "file").write_bytes(b"content")
    assert running.upload(tmp_path / "file", "file").size == 7
    assert [item.key for item in running.list()] == ["file", "key"]


def test_head_request_with_revoked_credentials_is_repeated(
    storage: Storage, s3_settings: StorageSettings, write_credentials: Callable[[str], None]
) -> None:
    storage.write("key", b"value")
    write_credentials("revoked-secret-key")
    running = Storage(storage.uri, StorageSettings(endpoint_url=s3_settings.endpoint_url))
    write_credentials(str(s3_settings.secret_key))
    assert running.size("key") == 5


def test_new_token_of_a_role_is_awaited_after_the_old_one_expired(
    storage: Storage, s3_settings: StorageSettings, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write("key", b"value")

    keys = ["OLD", "OLD", "OLD", str(s3_settings.access_key)]
    with role_server(s3_settings, keys) as url:
        monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", url)
        running = Storage(storage.uri, StorageSettings(endpoint_url=proxy.endpoint))
        expired = faults.error(400, "ExpiredToken", "The token has expired.")
        proxy.set_fault(Fault("old key", expired, lambda request: "=OLD/" in request.headers["Authorization"]))
        assert running.read("key") == b"value"
    assert keys == [s3_settings.access_key]
    assert proxy.fault_count >= 2


@pytest.mark.parametrize(
    ("status", "code"),
    [(400, "ExpiredToken"), (403, "AccessDenied"), (403, "InvalidAccessKeyId"), (401, "Unauthorized")],
)
def test_rejected_credentials_of_a_role_fail_after_a_bounded_number_of_attempts(
    storage: Storage,
    s3_settings: StorageSettings,
    proxy: Proxy,
    monkeypatch: pytest.MonkeyPatch,
    status: int,
    code: str,
) -> None:
    with role_server(s3_settings, [str(s3_settings.access_key)]) as url:
        monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", url)
        running = Storage(storage.uri, StorageSettings(endpoint_url=proxy.endpoint))
        proxy.set_fault(Fault("rejected", faults.error(status, code, "No.")))
        with pytest.raises(AccessError) as caught:
            running.read("key")
    assert caught.value.exit_code == 75
    assert proxy.fault_count == (4 if code == "ExpiredToken" else 1)


@pytest.mark.parametrize("code", ["ExpiredToken", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch"])
def test_credentials_from_variables_fail_immediately(
    storage: Storage, s3_settings: StorageSettings, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", str(s3_settings.access_key))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", str(s3_settings.secret_key))
    proxy.set_fault(Fault("rejected", faults.error(400 if code == "ExpiredToken" else 403, code, "No.")))
    with pytest.raises(AccessError):
        Storage(storage.uri, StorageSettings(endpoint_url=proxy.endpoint)).read("key")
    assert proxy.fault_count == 1


def test_unavailable_source_of_credentials_keeps_the_error_of_the_storage(
    storage: Storage, s3_settings: StorageSettings, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    with role_server(s3_settings, [str(s3_settings.access_key)]) as url:
        monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", url)
        running = Storage(storage.uri, StorageSettings(endpoint_url=proxy.endpoint))
        assert running.read("key") is None
    monkeypatch.setattr("botocore.utils.ContainerMetadataFetcher.SLEEP_TIME", 0.01)
    proxy.set_fault(Fault("rejected", faults.error(403, "AccessDenied", "No.")))
    with pytest.raises(AccessError, match="AccessDenied"):
        running.read("key")


def test_token_of_a_service_account_that_is_not_mounted_yet_is_awaited_by_the_job(
    s3_settings: StorageSettings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/topwork")
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(tmp_path / "token"))
    starting = Storage("s3://topwork-test", StorageSettings(endpoint_url=s3_settings.endpoint_url))
    with pytest.raises(UnavailableError, match=r"could not be retrieved: .*web-identity: .*No such file.*token"):
        starting.check()


@pytest.mark.parametrize("code", ["InvalidIdentityToken", "ExpiredTokenException", "AccessDenied"])
def test_rejected_token_of_a_service_account_ends_with_75(
    s3_settings: StorageSettings, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: str
) -> None:
    (tmp_path / "token").write_text("token")
    monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/topwork")
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(tmp_path / "token"))
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", proxy.endpoint)
    body = f"<ErrorResponse><Error><Code>{code}</Code><Message>No.</Message></Error></ErrorResponse>".encode()
    status = 403 if code == "AccessDenied" else 400
    proxy.set_fault(
        Fault(
            "rejected", lambda exchange: exchange.respond(faults.Response(status, [("Content-Type", "text/xml")], body))
        )
    )
    with pytest.raises(AccessError) as caught:
        Storage("s3://topwork-test", StorageSettings(endpoint_url=s3_settings.endpoint_url)).check()
    assert caught.value.exit_code == 75


@contextmanager
def role_server(settings: StorageSettings, keys: list[str]) -> Iterator[str]:
    """Serve the credentials of a container role, with the next access key at each request; the last one remains."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            pair = {"AccessKeyId": keys[0], "SecretAccessKey": settings.secret_key}
            if len(keys) > 1:
                keys.pop(0)
            body = json.dumps({**pair, "Token": "", "Expiration": "2099-01-01T00:00:00Z"}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/role"
        server.shutdown()
