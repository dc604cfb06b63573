"""Hostile and broken web servers: where a download may connect, and how long it may take."""

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
from contextlib import nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from topwork.clients.url_policy import allow_plain_http, check_plain_http, is_forbidden_host
from topwork.data.sources import download, http_client
from topwork.data.sources.download import RemoteFile
from topwork.errors import DataError, SettingError, UnavailableError

CONTENT = random.Random(1).randbytes(300_000)
Responder = Callable[[http.server.BaseHTTPRequestHandler], None]


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.server.requests.append((self.path, self.headers.get("Range")))
        self.server.headers.append(dict(self.headers))
        self.close_connection = True
        self.server.respond(self)

    do_HEAD = do_GET


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    for name in ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def serve(monkeypatch) -> Iterator[Callable[..., SimpleNamespace]]:
    """Start servers that respond with a function and record the requests."""
    monkeypatch.setattr(download, "BACKOFF_SECONDS", 0.01)
    monkeypatch.setattr(download, "MAX_BACKOFF_SECONDS", 0.02)
    servers = []

    def start(respond: Responder, tls: ssl.SSLContext | None = None) -> SimpleNamespace:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        if tls:
            server.socket = tls.wrap_socket(server.socket, server_side=True)
        server.respond, server.requests, server.headers = respond, [], []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        url = f"http{'s' if tls else ''}://localhost:{server.server_port}/a.zip"
        return SimpleNamespace(url=url, requests=server.requests, headers=server.headers)

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def send(handler: Any, data: bytes, length: int | None = None, status: int = 200, **headers: str) -> None:
    handler.send_response(status)
    for name, value in {"Content_Length": str(len(data) if length is None else length), **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(data)


def send_content(handler: Any) -> None:
    send(handler, CONTENT)


def redirect(to: str) -> Responder:
    return lambda handler: send(handler, b"", status=302, Location=to)


def fetch(url: str, tmp_path: Path) -> bytes:
    RemoteFile(url).download(tmp_path / "a.zip")
    return (tmp_path / "a.zip").read_bytes()


FORBIDDEN = [
    "http://169.254.169.254/latest/meta-data/iam/security-credentials/",
    "http://[fe80::1]/a.zip",
    "http://[::ffff:169.254.169.254]/a.zip",
    "http://metadata.google.internal/computeMetadata/v1/",
    "http://100.100.100.200/latest/meta-data/",
    "http://[fd00:ec2::254]/latest/meta-data/",
]


@pytest.mark.parametrize("url", FORBIDDEN)
def test_download_rejects_link_local_and_metadata_hosts_directly_and_after_a_redirect(serve, tmp_path, url):
    with pytest.raises(DataError, match="a link-local address or a cloud metadata service"):
        RemoteFile(url).download(tmp_path / "a.zip")
    server = serve(redirect(url))
    with pytest.raises(DataError, match="a link-local address or a cloud metadata service"):
        RemoteFile(server.url).version()
    assert len(server.requests) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://localhost/a.zip", "data:text/plain,x", "gopher://x/"])
def test_download_rejects_redirects_to_other_schemes(serve, tmp_path, url):
    with pytest.raises(DataError, match=rf"points to a {url.split(':')[0]}: URL\. Only http and https"):
        fetch(serve(redirect(url)).url, tmp_path)


@pytest.mark.parametrize(("url", "reason"), [("http://[::1/", "not a valid URL"), ("https:///x", "without a host")])
def test_download_rejects_redirects_to_malformed_urls(serve, tmp_path, url, reason):
    with pytest.raises(DataError, match=reason):
        fetch(serve(redirect(url)).url, tmp_path)


def test_download_rejects_a_name_that_resolves_to_a_forbidden_address_before_sending(serve, tmp_path, monkeypatch):
    server = serve(send_content)
    # No machine has a name for a link-local address, so this test forbids the loopback address.
    monkeypatch.setattr(http_client, "is_forbidden_host", lambda host: host in ("127.0.0.1", "::1"))
    with pytest.raises(DataError, match=r"points to (127\.0\.0\.1|::1), a link-local address"):
        fetch(server.url, tmp_path)
    assert server.requests == []


def test_download_checks_the_peer_address_before_the_tls_handshake(serve, tls, tmp_path, monkeypatch):
    monkeypatch.setattr(http_client, "is_forbidden_host", lambda host: host in ("127.0.0.1", "::1"))
    # The certificate is not trusted: a handshake would end in another error.
    with pytest.raises(DataError, match=r"points to (127\.0\.0\.1|::1), a link-local address"):
        fetch(serve(send_content, tls).url, tmp_path)


def test_download_follows_redirects_and_never_shows_their_query(serve, tmp_path):
    target = serve(lambda handler: send(handler, CONTENT if "id=1" in handler.path else b"", status=200))
    assert fetch(serve(redirect(f"{target.url}?id=1")).url, tmp_path) == CONTENT
    missing = serve(lambda handler: send(handler, b"", status=404))
    with pytest.raises(DataError) as error:
        fetch(serve(redirect(f"{missing.url}?X-Amz-Signature=hidden")).url, tmp_path)
    assert "hidden" not in str(error.value)
    malformed = serve(redirect("http://[::1/?X-Amz-Signature=hidden"))
    with pytest.raises(DataError) as error:
        fetch(malformed.url, tmp_path)
    assert "hidden" not in str(error.value)


def test_download_does_not_log_the_query(serve, tmp_path, caplog):
    def respond(handler: Any) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nnot a header\r\nETag: x\r\n\r\nabc")

    assert fetch(f"{serve(respond).url}?id=hidden", tmp_path)
    assert "hidden" not in "".join(record.getMessage() for record in caplog.records if record.levelno >= 30)


def test_download_stops_after_10_redirects(serve, tmp_path):
    server = serve(lambda handler: send(handler, b"", status=302, Location=f"/{len(handler.server.requests)}"))
    with pytest.raises(DataError, match="redirects more than 10 times"):
        fetch(server.url, tmp_path)
    assert len(server.requests) == 11


def send_endlessly(handler: Any, status: int, **headers: str) -> None:
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name, value)
    handler.end_headers()
    try:
        while True:
            handler.wfile.write(bytes(2**20))
    except OSError:
        pass


def test_download_never_reads_the_body_of_a_redirect_or_an_error(serve, tmp_path):
    target = serve(send_content)
    assert fetch(serve(lambda handler: send_endlessly(handler, 302, Location=target.url)).url, tmp_path) == CONTENT
    with pytest.raises(UnavailableError, match="the server responded with 503"):
        fetch(serve(lambda handler: send_endlessly(handler, 503)).url, tmp_path)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("certificate")
    request = "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=DNS:localhost"
    subprocess.run(
        ["openssl", *request.split(), "-keyout", "key.pem", "-out", "ca.pem"],
        cwd=directory,
        check=True,
        capture_output=True,
    )
    return directory / "ca.pem"


@pytest.fixture
def tls(certificate) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, certificate.with_name("key.pem"))
    return context


def test_download_verifies_certificates(serve, tls, certificate, tmp_path, monkeypatch):
    server = serve(send_content, tls)
    with pytest.raises(SettingError, match=r"the certificate of the server is not trusted \(self.signed certificate\)"):
        fetch(server.url, tmp_path)
    assert server.requests == []
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    assert fetch(server.url, tmp_path) == CONTENT
    with pytest.raises(SettingError, match=r"is not trusted \(IP address mismatch"):
        fetch(server.url.replace("localhost", "127.0.0.1"), tmp_path)


def test_download_rejects_redirects_from_https_to_http(serve, tls, certificate, tmp_path, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    plain = serve(send_content)
    with pytest.raises(DataError, match=r"redirects from https to plain http \(localhost\)"):
        fetch(serve(redirect(plain.url), tls).url, tmp_path)
    assert plain.requests == []


# Proxies and credentials


def test_download_uses_the_proxy_and_sends_it_its_credentials(serve, tmp_path, monkeypatch):
    proxy = serve(send_content)
    monkeypatch.setenv("http_proxy", proxy.url.replace("http://", "http://ada:p%40ss@").removesuffix("/a.zip"))
    assert fetch("http://data.svc/a.zip?id=1", tmp_path) == CONTENT
    assert proxy.requests == [("http://data.svc/a.zip?id=1", None)]
    assert proxy.headers[0]["Host"] == "data.svc"
    assert proxy.headers[0]["Proxy-Authorization"] == "Basic YWRhOnBAc3M="


def test_download_sends_proxy_credentials_to_the_proxy_only(serve, tmp_path, monkeypatch):
    target = serve(send_content)
    proxy = serve(redirect(target.url))
    monkeypatch.setenv("http_proxy", proxy.url.replace("http://", "http://ada:secret@").removesuffix("/a.zip"))
    monkeypatch.setenv("no_proxy", "localhost")
    assert fetch("http://data.svc/a.zip", tmp_path) == CONTENT
    assert "Proxy-Authorization" in proxy.headers[0]
    assert "Proxy-Authorization" not in target.headers[0]


def test_download_drops_credentials_in_a_redirect(serve, tmp_path, monkeypatch):
    target = serve(send_content)
    assert fetch(serve(redirect(target.url.replace("//", "//ada:secret@"))).url, tmp_path) == CONTENT
    assert "Authorization" not in target.headers[0]
    proxy = serve(send_content)
    monkeypatch.setenv("http_proxy", proxy.url.removesuffix("/a.zip"))
    monkeypatch.setenv("no_proxy", "localhost")
    fetch(serve(redirect("http://ada:secret@data.svc/b.zip")).url, tmp_path)
    assert proxy.requests == [("http://data.svc/b.zip", None)]


def test_download_rejects_a_proxy_with_an_unsupported_scheme(tmp_path, monkeypatch):
    monkeypatch.setenv("https_proxy", "socks5://proxy:1080")
    with pytest.raises(SettingError, match=r"proxy of the environment .* unsupported scheme"):
        fetch("https://example.com/a.zip", tmp_path)


# Broken, slow and stalled connections


def send_in_pieces(handler: Any, changed: bool = False, tag: str = '"one"') -> None:
    """Close the connection after 100,000 bytes, and resume at the requested byte. A changed file is sent completely."""
    start = int((handler.headers.get("Range") or "bytes=0-")[6:-1])
    is_known = handler.headers.get("If-Range") in (None, tag)
    content = CONTENT[::-1] if changed else CONTENT
    start = start if is_known else 0
    headers = {"ETag": tag, **({"Content_Range": f"bytes {start}-299999/300000"} if start else {})}
    count = 300_000 if changed and not start else 100_000
    send(handler, content[start : start + count], 300_000 - start, 206 if start else 200, **headers)


def test_download_resumes_where_the_connection_broke(serve, tmp_path):
    server = serve(send_in_pieces)
    assert fetch(server.url, tmp_path) == CONTENT
    assert [range_header for _, range_header in server.requests] == [None, "bytes=100000-", "bytes=200000-"]


def test_download_restarts_when_the_file_has_changed(serve, tmp_path):
    numbers = itertools.count()

    def respond(handler: Any) -> None:
        changed = next(numbers) > 0
        send_in_pieces(handler, changed, '"two"' if changed else '"one"')

    assert fetch(serve(respond).url, tmp_path) == CONTENT[::-1]


def test_download_restarts_when_the_file_has_become_shorter(serve, tmp_path):
    def respond(handler: Any) -> None:
        if len(handler.server.requests) == 1:
            send_in_pieces(handler)
        elif handler.headers.get("Range"):
            send(handler, b"", status=416)
        else:
            send(handler, b"short")

    server = serve(respond)
    assert fetch(server.url, tmp_path) == b"short"
    assert [range_header for _, range_header in server.requests] == [None, "bytes=100000-", None]


def test_download_rejects_a_server_that_resumes_at_another_byte(serve, tmp_path):
    def respond(handler: Any) -> None:
        if handler.headers.get("Range"):
            send(handler, b"x" * 10, status=206, Content_Range="bytes 7-16/300000", ETag='"one"')
        else:
            send_in_pieces(handler)

    with pytest.raises(UnavailableError, match="was asked to resume at byte 100000 but resumed at byte 7"):
        fetch(serve(respond).url, tmp_path)


def test_download_reports_how_much_arrived_before_the_connection_closed(serve, tmp_path):
    with pytest.raises(UnavailableError, match="in 5 attempts: the connection closed after 4 of 10 bytes"):
        fetch(serve(lambda handler: send(handler, b"four", 10)).url, tmp_path)


def send_slowly(handler: Any) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000000")
    handler.end_headers()
    try:
        while True:
            handler.wfile.write(b"x")
            time.sleep(0.02)
    except OSError:
        pass


def send_headers_slowly(handler: Any) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    try:
        for number in itertools.count():
            handler.wfile.write(f"X-{number}: y\r\n".encode())
            time.sleep(0.05)
    except OSError:
        pass


def test_download_fails_when_the_server_is_too_slow(serve, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "STALL_SECONDS", 0.1)
    with pytest.raises(UnavailableError, match=r"in 5 attempts: received only \d+ bytes in \d+ seconds"):
        fetch(serve(send_slowly).url, tmp_path)


def test_download_is_not_retried_after_the_total_time_limit(serve, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "MAX_SECONDS", 0.3)
    server = serve(send_slowly)
    with pytest.raises(UnavailableError, match="was not downloaded within"):
        fetch(server.url, tmp_path)
    assert len(server.requests) == 1


@pytest.mark.parametrize("is_encrypted", [False, True])
def test_download_fails_when_the_response_headers_never_end(
    serve, tls, certificate, tmp_path, monkeypatch, is_encrypted
):
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    monkeypatch.setattr(http_client, "HEADERS_TIMEOUT_SECONDS", 0.3)
    start = time.monotonic()
    with pytest.raises(UnavailableError, match=r"5 attempts: the response headers did not arrive within 0\.3 s"):
        fetch(serve(send_headers_slowly, tls if is_encrypted else None).url, tmp_path)
    assert time.monotonic() - start < 10


def test_download_fails_when_the_tls_handshake_never_ends(tmp_path, monkeypatch, serve):
    monkeypatch.setattr(http_client, "HEADERS_TIMEOUT_SECONDS", 0.2)
    stopped = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            # The header of a TLS record, whose content then arrives byte by byte.
            while True:
                with suppress(OSError), listener.accept()[0] as connection:
                    connection.sendall(b"\x16\x03\x03\x40\x00")
                    while True:
                        connection.sendall(b"\x02")
                        time.sleep(0.02)
                if stopped.is_set():
                    return

        thread = threading.Thread(target=accept)
        thread.start()
        with pytest.raises(UnavailableError, match=r"the response headers did not arrive within 0\.2 seconds"):
            fetch(f"https://localhost:{listener.getsockname()[1]}/a.zip", tmp_path)
        stopped.set()
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


def test_download_fails_when_the_server_never_responds(serve, tmp_path, monkeypatch):
    monkeypatch.setattr(http_client, "SOCKET_TIMEOUT_SECONDS", 0.2)
    with pytest.raises(UnavailableError, match="timed out"):
        fetch(serve(lambda handler: time.sleep(1)).url, tmp_path)


def unavailable_once(retry_after: str) -> Responder:
    def respond(handler: Any) -> None:
        if len(handler.server.requests) == 1:
            send(handler, b"", status=503, Retry_After=retry_after)
        else:
            send_content(handler)

    return respond


def test_download_waits_as_long_as_retry_after_requests(serve, tmp_path):
    start = time.monotonic()
    assert fetch(serve(unavailable_once("1")).url, tmp_path) == CONTENT
    assert time.monotonic() - start >= 1


@pytest.mark.parametrize("value", ["86400", "Fri, 31 Dec 9999 23:59:59 GMT"])
def test_download_limits_the_wait_that_retry_after_requests(serve, tmp_path, monkeypatch, value):
    monkeypatch.setattr(download, "MAX_RETRY_AFTER_SECONDS", 0.3)
    start = time.monotonic()
    assert fetch(serve(unavailable_once(value)).url, tmp_path) == CONTENT
    assert 0.3 <= time.monotonic() - start < 10


@pytest.mark.parametrize("value", ["soon", "-5", "9" * 5000, "Fri, 31 Dec 999999999999 23:59:59 GMT"])
def test_download_ignores_an_invalid_retry_after(serve, tmp_path, monkeypatch, value):
    monkeypatch.setattr(download, "MAX_RETRY_AFTER_SECONDS", 0.1)
    assert fetch(serve(unavailable_once(value)).url, tmp_path) == CONTENT


@pytest.mark.parametrize("length", ["many", "-1", "1, 2", "9" * 5000])
def test_size_is_unknown_or_unavailable_when_the_content_length_is_invalid(serve, length):
    server = serve(lambda handler: send(handler, b"", Content_Length=length))
    with nullcontext() if length != "1, 2" else pytest.raises(UnavailableError):
        assert RemoteFile(server.url).size() is None


def test_download_reports_each_chunk_that_arrives(serve, tmp_path):
    chunks = []
    RemoteFile(serve(send_content).url, lambda: chunks.append(1)).download(tmp_path / "a.zip")
    assert chunks


def test_download_raises_and_does_not_retry_when_the_disk_is_full(serve, tmp_path, monkeypatch):
    server = serve(send_content)
    monkeypatch.setattr(Path, "open", lambda self, mode: io.FileIO("/dev/full", mode))
    with pytest.raises(OSError, match="No space left on device"):
        RemoteFile(server.url).download(tmp_path / "a.zip")
    assert len(server.requests) == 1


# Servers without HEAD


def reject_head(status: int) -> Responder:
    def respond(handler: Any) -> None:
        if handler.command == "HEAD":
            send(handler, b"", status=status)
        elif handler.headers.get("Range") == "bytes=0-0":
            send(handler, CONTENT[:1], status=206, ETag='"one"', Content_Range="bytes 0-0/300000")
        else:
            send(handler, CONTENT, ETag='"one"')

    return respond


@pytest.mark.parametrize("status", [403, 404, 405, 500, 501])
def test_version_and_size_come_from_a_ranged_get_when_head_is_rejected(serve, tmp_path, status):
    server = serve(reject_head(status))
    file = RemoteFile(server.url)
    assert (file.version(), file.size()) == ('"one" 300000', 300_000)
    assert [range_header for _, range_header in server.requests] == [None, "bytes=0-0", "bytes=0-0"]
    assert fetch(server.url, tmp_path) == CONTENT
    answered = serve(lambda handler: send(handler, b"", 300_000, ETag='"one"'))
    assert RemoteFile(answered.url).version() == '"one" 300000'


def test_version_comes_from_a_get_when_head_never_answers_or_omits_headers(serve, monkeypatch):
    monkeypatch.setattr(http_client, "SOCKET_TIMEOUT_SECONDS", 0.2)

    def respond(handler: Any) -> None:
        if handler.command == "HEAD":
            time.sleep(1)
        else:
            send(handler, b"abc", Last_Modified="Sat, 01 Jan 2022 00:00:00 GMT")  # ignores the range

    server = serve(respond)
    assert RemoteFile(server.url).version() == f"{server.url} Sat, 01 Jan 2022 00:00:00 GMT 3"
    nothing = serve(lambda handler: handler.wfile.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nabc"))
    assert (RemoteFile(nothing.url).version(), RemoteFile(nothing.url).size()) == (None, None)


def test_requests_name_topwork_as_the_user_agent(serve, tmp_path):
    def respond(handler: Any) -> None:
        is_blocked = "urllib" in handler.headers["User-Agent"] or "Mozilla" not in handler.headers["User-Agent"]
        send(handler, b"blocked", status=403) if is_blocked else send_content(handler)

    server = serve(redirect(serve(respond).url))
    assert fetch(server.url, tmp_path) == CONTENT
    assert server.headers[0]["User-Agent"].startswith("topwork/0.")


def test_missing_file_is_rejected_with_the_status_of_the_get(serve):
    with pytest.raises(DataError, match=r"the server responded with 404 Not Found\. Check the address"):
        RemoteFile(serve(lambda handler: send(handler, b"", status=404)).url).version()


# Plain HTTP

PRIVATE = ["localhost", "127.0.0.1", "[::1]", "10.1.2.3", "172.31.0.1", "192.168.1.9", "[fd12::1]", "minio",
           "s3.store.svc", "s3.store.svc.cluster.local", "s3.store.svc.other.example", "a.localhost",
           "s3.cluster.local"]  # fmt: skip
PUBLIC = ["example.com", "8.8.8.8", "172.32.0.1", "minio.internal", "store.local", "svc.example.com", "[2001:db8::1]",
          "100.64.0.1", "evil.svc-cluster.local", "localhost.example.com"]  # fmt: skip


@pytest.mark.parametrize("host", PRIVATE)
def test_check_plain_http_allows_this_machine_the_cluster_and_private_networks(host):
    check_plain_http(f"http://{host}:9000/a", "It")


@pytest.mark.parametrize("host", PUBLIC)
def test_check_plain_http_rejects_public_hosts(host):
    with pytest.raises(SettingError, match=r"^It is plain HTTP to .* or allow it with TOPWORK_ALLOW_HTTP="):
        check_plain_http(f"http://{host}:9000/a", "It")
    check_plain_http(f"https://{host}/a", "It")


def test_check_plain_http_allows_hosts_that_the_user_allowed():
    allow_plain_http(["Example.com", ""])
    try:
        check_plain_http("http://example.com./a", "It")
        with pytest.raises(SettingError):
            check_plain_http("http://www.example.com/a", "It")
    finally:
        allow_plain_http([])


def test_download_rejects_a_redirect_to_plain_http_on_a_public_network(serve, tmp_path):
    with pytest.raises(SettingError, match=r"is plain HTTP to 8\.8\.8\.8"):
        fetch(serve(redirect("http://8.8.8.8/a.zip")).url, tmp_path)


@pytest.mark.parametrize("host", ["169.254.0.1", "fe80::1%eth0", "METADATA.google.internal.", "224.0.0.1"])
def test_is_forbidden_host_recognizes_every_spelling(host):
    assert is_forbidden_host(host)


@pytest.mark.parametrize(
    ("addresses", "is_allowed"),
    [(["10.96.3.4"], True), (["10.96.3.4", "fd00::7"], True), (["10.96.3.4", "93.184.216.34"], False), ([], False)],
)
def test_check_plain_http_allows_names_that_resolve_only_to_private_addresses(monkeypatch, addresses, is_allowed):
    def resolve(host, *_, **__):
        if not addresses:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in addresses]

    # The test environment has no name server that knows a cluster service.
    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with nullcontext() if is_allowed else pytest.raises(SettingError, match=r"^It is plain HTTP to minio\.storage"):
        check_plain_http("http://minio.storage:9000", "It")
