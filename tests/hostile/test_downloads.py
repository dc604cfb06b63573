"""Servers that mean harm, or are merely broken: where a download may lead, and how long it may take."""

import http.server
import io
import itertools
import random
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from topwork.clients.url_policy import allow_plain_http, check_plain_http, is_forbidden
from topwork.data.sources import download
from topwork.data.sources import http as requests
from topwork.data.sources.download import Download
from topwork.errors import DataError, SettingError, UnavailableError

CONTENT = random.Random(1).randbytes(300_000)
Answer = Callable[[http.server.BaseHTTPRequestHandler], None]


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.server.seen.append((self.path, self.headers.get("Range")))
        self.close_connection = True
        self.server.answer(self)

    do_HEAD = do_GET


@pytest.fixture
def serve(monkeypatch) -> Iterator[Callable[..., SimpleNamespace]]:
    """Start a server that answers as a function says, and tells what it was asked."""
    monkeypatch.setattr(download, "FIRST_WAIT_SECONDS", 0.01)
    monkeypatch.setattr(download, "LONGEST_WAIT_SECONDS", 0.02)
    running = []

    def start(answer: Answer, tls: ssl.SSLContext | None = None) -> SimpleNamespace:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        if tls:
            server.socket = tls.wrap_socket(server.socket, server_side=True)
        server.answer, server.seen = answer, []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        running.append(server)
        uri = f"http{'s' if tls else ''}://localhost:{server.server_port}/a.zip"
        return SimpleNamespace(uri=uri, seen=server.seen)

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


def send(handler: Any, data: bytes, length: int | None = None, status: int = 200, **headers: str) -> None:
    handler.send_response(status)
    for name, value in {"Content-Length": str(len(data) if length is None else length), **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(data)


def redirect(to: str) -> Answer:
    return lambda handler: send(handler, b"", status=302, Location=to)


def fetched(uri: str, tmp_path: Path) -> bytes:
    Download(uri).fetch(tmp_path / "a.zip")
    return (tmp_path / "a.zip").read_bytes()


FORBIDDEN = [
    "http://169.254.169.254/latest/meta-data/iam/security-credentials/",
    "http://[fe80::1]/a.zip",
    "http://[::ffff:169.254.169.254]/a.zip",
    "http://metadata.google.internal/computeMetadata/v1/",
    "http://100.100.100.200/latest/meta-data/",
    "http://[fd00:ec2::254]/latest/meta-data/",
]


@pytest.mark.parametrize("uri", FORBIDDEN)
def test_link_local_addresses_and_metadata_services_are_refused_named_or_led_to(serve, tmp_path, uri):
    with pytest.raises(DataError, match="a link-local address or the metadata service of a cloud"):
        Download(uri).fetch(tmp_path / "a.zip")
    server = serve(redirect(uri))
    with pytest.raises(DataError, match="a link-local address or the metadata service of a cloud"):
        Download(server.uri).state()
    assert len(server.seen) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("uri", ["file:///etc/passwd", "ftp://localhost/a.zip", "data:text/plain,x", "gopher://x/"])
def test_redirects_to_other_kinds_of_addresses_are_refused(serve, tmp_path, uri):
    with pytest.raises(DataError, match=rf"leads to an address of the kind {uri.split(':')[0]}:\. Only http and https"):
        fetched(serve(redirect(uri)).uri, tmp_path)


def test_a_name_that_leads_to_a_forbidden_address_is_refused_before_anything_is_sent(serve, tmp_path, monkeypatch):
    server = serve(lambda handler: send(handler, CONTENT))
    # No machine has a name for a link-local address: here the loopback one is forbidden.
    monkeypatch.setattr(requests, "is_forbidden", lambda host: host in ("127.0.0.1", "::1"))
    with pytest.raises(DataError, match=r"leads to (127\.0\.0\.1|::1), a link-local address"):
        fetched(server.uri, tmp_path)
    assert server.seen == []


def test_a_redirect_is_followed_and_its_query_never_shown(serve, tmp_path):
    target = serve(lambda handler: send(handler, CONTENT if "id=1" in handler.path else b"", status=200))
    assert fetched(serve(redirect(f"{target.uri}?id=1")).uri, tmp_path) == CONTENT
    gone = serve(lambda handler: send(handler, b"", status=404))
    with pytest.raises(DataError) as refused:
        fetched(serve(redirect(f"{gone.uri}?X-Amz-Signature=hidden")).uri, tmp_path)
    assert "hidden" not in str(refused.value)


def test_redirects_in_a_circle_end(serve, tmp_path):
    server = serve(lambda handler: send(handler, b"", status=302, Location=f"/{len(handler.server.seen)}"))
    with pytest.raises(DataError, match="leads from one address to the next, 10 times"):
        fetched(server.uri, tmp_path)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("certificate")
    request = "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=DNS:localhost"
    subprocess.run(
        ["openssl", *request.split(), "-keyout", "key.pem", "-out", "ca.pem"],
        cwd=folder,
        check=True,
        capture_output=True,
    )
    return folder / "ca.pem"


@pytest.fixture
def tls(certificate) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, certificate.with_name("key.pem"))
    return context


def test_certificates_are_checked(serve, tls, certificate, tmp_path, monkeypatch):
    server = serve(lambda handler: send(handler, CONTENT), tls)
    with pytest.raises(SettingError, match=r"the certificate of the server is not trusted \(self.signed certificate\)"):
        fetched(server.uri, tmp_path)
    assert server.seen == []
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    assert fetched(server.uri, tmp_path) == CONTENT
    with pytest.raises(SettingError, match=r"is not trusted \(IP address mismatch"):
        fetched(server.uri.replace("localhost", "127.0.0.1"), tmp_path)


def test_a_step_down_from_https_to_http_is_refused(serve, tls, certificate, tmp_path, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    plain = serve(lambda handler: send(handler, CONTENT))
    with pytest.raises(DataError, match=r"leads from https to plain http \(localhost\)"):
        fetched(serve(redirect(plain.uri), tls).uri, tmp_path)
    assert plain.seen == []


# Broken off, slow and silent


def in_pieces(handler: Any, changed: bool = False, tag: str = '"one"') -> None:
    """Break off after each 100,000 bytes; go on where a client asks for it. A file that changed is sent whole."""
    begins = int((handler.headers.get("Range") or "bytes=0-")[6:-1])
    known = handler.headers.get("If-Range") in (None, tag)
    content = CONTENT[::-1] if changed else CONTENT
    begins = begins if known else 0
    headers = {"ETag": tag, **({"Content_Range": f"bytes {begins}-299999/300000"} if begins else {})}
    whole = changed and not begins
    send(handler, content[begins:][: None if whole else 100_000], 300_000 - begins, 206 if begins else 200, **headers)


def test_a_download_that_breaks_off_goes_on_where_it_was(serve, tmp_path):
    server = serve(in_pieces)
    assert fetched(server.uri, tmp_path) == CONTENT
    assert [asked for _, asked in server.seen] == [None, "bytes=100000-", "bytes=200000-"]


def test_a_file_that_changed_meanwhile_is_fetched_from_the_start(serve, tmp_path):
    numbers = itertools.count()

    def answer(handler: Any) -> None:
        changed = next(numbers) > 0
        in_pieces(handler, changed, '"two"' if changed else '"one"')

    assert fetched(serve(answer).uri, tmp_path) == CONTENT[::-1]


def test_a_server_that_goes_on_elsewhere_is_not_believed(serve, tmp_path):
    def answer(handler: Any) -> None:
        if handler.headers.get("Range"):
            send(handler, b"x" * 10, status=206, Content_Range="bytes 7-16/300000", ETag='"one"')
        else:
            in_pieces(handler)

    with pytest.raises(UnavailableError, match="it was asked to go on at byte 100000, and went on at 7"):
        fetched(serve(answer).uri, tmp_path)


def trickle(handler: Any) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000000")
    handler.end_headers()
    try:
        while True:
            handler.wfile.write(b"x")
            time.sleep(0.02)
    except OSError:
        pass


def trickling_head(handler: Any) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    try:
        for number in itertools.count():
            handler.wfile.write(f"X-{number}: y\r\n".encode())
            time.sleep(0.05)
    except OSError:
        pass


def test_a_download_that_is_too_slow_to_end_is_given_up(serve, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "SLOW_SECONDS", 0.1)
    with pytest.raises(UnavailableError, match=r"in 5 attempts: \d+ bytes came in \d+ seconds"):
        fetched(serve(trickle).uri, tmp_path)


def test_a_download_that_takes_too_long_in_all_is_given_up_at_once(serve, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "MAX_SECONDS", 0.3)
    server = serve(trickle)
    with pytest.raises(UnavailableError, match="is not fetched after"):
        fetched(server.uri, tmp_path)
    assert len(server.seen) == 1


def test_an_answer_whose_head_never_ends_is_cut(serve, tmp_path, monkeypatch):
    monkeypatch.setattr(requests, "ANSWER_SECONDS", 0.3)
    began = time.monotonic()
    with pytest.raises(UnavailableError, match="in 5 attempts"):
        fetched(serve(trickling_head).uri, tmp_path)
    assert time.monotonic() - began < 10


def test_a_server_that_says_nothing_is_given_up(serve, tmp_path, monkeypatch):
    monkeypatch.setattr(requests, "SILENCE_SECONDS", 0.2)
    with pytest.raises(UnavailableError, match="timed out"):
        fetched(serve(lambda handler: time.sleep(1)).uri, tmp_path)


def test_each_piece_that_arrives_is_a_sign_that_work_goes_on(serve, tmp_path):
    pieces = []
    Download(serve(lambda handler: send(handler, CONTENT)).uri, lambda: pieces.append(1)).fetch(tmp_path / "a.zip")
    assert pieces


def test_a_full_disk_is_no_failure_of_the_network(serve, tmp_path, monkeypatch):
    server = serve(lambda handler: send(handler, CONTENT))
    monkeypatch.setattr(Path, "open", lambda self, mode: io.FileIO("/dev/full", mode))
    with pytest.raises(OSError, match="No space left on device"):
        Download(server.uri).fetch(tmp_path / "a.zip")
    assert len(server.seen) == 1


# Plain HTTP

NEAR = ["localhost", "127.0.0.1", "[::1]", "10.1.2.3", "172.31.0.1", "192.168.1.9", "[fd12::1]", "minio",
        "s3.store.svc", "s3.store.svc.cluster.local", "s3.store.svc.other.example", "a.localhost",
        "s3.cluster.local"]  # fmt: skip
FAR = ["example.com", "8.8.8.8", "172.32.0.1", "minio.internal", "store.local", "svc.example.com", "[2001:db8::1]",
       "100.64.0.1", "evil.svc-cluster.local", "localhost.example.com"]  # fmt: skip


@pytest.mark.parametrize("host", NEAR)
def test_plain_http_stays_on_the_machine_in_the_cluster_and_in_private_networks(host):
    check_plain_http(f"http://{host}:9000/a", "It")


@pytest.mark.parametrize("host", FAR)
def test_plain_http_over_the_open_network_is_refused(host):
    with pytest.raises(SettingError, match=r"^It is plain HTTP to .* or allow it with TOPWORK_ALLOW_HTTP="):
        check_plain_http(f"http://{host}:9000/a", "It")
    check_plain_http(f"https://{host}/a", "It")


def test_plain_http_is_allowed_to_hosts_that_are_named():
    allow_plain_http(["Example.com", ""])
    try:
        check_plain_http("http://example.com./a", "It")
        with pytest.raises(SettingError):
            check_plain_http("http://www.example.com/a", "It")
    finally:
        allow_plain_http([])


@pytest.mark.parametrize("host", ["169.254.0.1", "fe80::1%eth0", "METADATA.google.internal.", "224.0.0.1"])
def test_forbidden_hosts_are_known_in_every_spelling(host):
    assert is_forbidden(host)


@pytest.mark.parametrize(
    ("addresses", "allowed"),
    [(["10.96.3.4"], True), (["10.96.3.4", "fd00::7"], True), (["10.96.3.4", "93.184.216.34"], False), ([], False)],
)
def test_a_name_that_leads_to_private_addresses_alone_is_near(monkeypatch, addresses, allowed):
    def look_up(host, *_, **__):
        if not addresses:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in addresses]

    # No name server is to be had that knows a service of a cluster.
    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    with nullcontext() if allowed else pytest.raises(SettingError, match=r"^It is plain HTTP to minio\.storage"):
        check_plain_http("http://minio.storage:9000", "It")
