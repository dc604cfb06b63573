"""Reading the metrics of runs: from the metrics page of a process, or from a Prometheus server."""

import base64
import json
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import unquote, urlencode, urlsplit, urlunsplit

import urllib3
from prometheus_client.parser import text_string_to_metric_families

from topwork.clients.url_policy import check_plain_http
from topwork.errors import SettingError, UnavailableError

PREFIX = "topwork_"
PAGE_TIMEOUT_SECONDS = 5.0
QUERY_TIMEOUT_SECONDS = 20.0
MAX_RESPONSE_BYTES = 64 * 2**20
# A run has about a hundred series of a few hundred bytes each.
MAX_PAGE_BYTES = 2 * 2**20
MAX_EXCERPT_CHARACTERS = 120


class Sample(NamedTuple):
    """The value of a series at one time."""

    name: str
    labels: Mapping[str, str]
    value: float


@dataclass(frozen=True)
class Reading:
    """The series of one process at one time.

    Attributes:
        at: Unix time in seconds.
        samples: The series whose names begin with `topwork_`.
    """

    at: float
    samples: tuple[Sample, ...]

    def value(self, name: str, **labels: str) -> float | None:
        """Return the value of the first series with this name (without `topwork_`) and these labels; None if absent."""
        required = labels.items()
        return next((sample.value for sample in self.select(name) if required <= sample.labels.items()), None)

    def values_by_label(self, name: str, label: str) -> dict[str, float]:
        """Return the values of all series with this name (without `topwork_`), keyed by the value of a label."""
        return {sample.labels[label]: sample.value for sample in self.select(name) if label in sample.labels}

    def select(self, name: str) -> Iterator[Sample]:
        """Yield all series with this name (without `topwork_`)."""
        return (sample for sample in self.samples if sample.name == PREFIX + name)

    def label(self, name: str) -> str | None:
        """Return the value of a label, from the first series that has it."""
        return next((sample.labels[name] for sample in self.samples if name in sample.labels), None)


class ScrapeTarget(NamedTuple):
    """A process that Prometheus scrapes."""

    run: str
    namespace: str
    pod: str
    instance: str


def parse_page(text: str, at: float) -> Reading:
    """Parse a metrics page in the Prometheus text format.

    Args:
        text: The page.
        at: Unix time of the request, in seconds.

    Returns:
        The series of topwork on the page.

    Raises:
        ValueError: If the text is not in the Prometheus text format.
    """
    samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
    return Reading(
        at,
        tuple(Sample(sample.name, sample.labels, sample.value) for sample in samples if sample.name.startswith(PREFIX)),
    )


def read_page(url: str, timeout_seconds: float = PAGE_TIMEOUT_SECONDS) -> Reading:
    """Read the metrics page of a process.

    Args:
        url: URL of the page, such as `http://127.0.0.1:9101/metrics`.
        timeout_seconds: Time to wait for a connection, and then for the complete response.

    Returns:
        The series of topwork on the page.

    Raises:
        SettingError: If the server at this URL does not serve metrics.
        UnavailableError: If the server does not answer.
    """
    response = _get(url, timeout_seconds, MAX_PAGE_BYTES, accept="text/plain;version=0.0.4")
    if response.status != 200:
        raise SettingError(
            f"{without_credentials(url)} answers with HTTP {response.status}: the path of a metrics page is usually "
            "/metrics."
        )
    try:
        return parse_page(response.text, time.time())
    except ValueError:
        raise SettingError(
            f"{without_credentials(url)} does not serve metrics ({_excerpt(response.text)}). Check the URL."
        ) from None


class PrometheusClient:
    """A client for the HTTP API of Prometheus, or of a compatible server.

    Args:
        url: URL of the server, with a path if it has one. It can contain the user and password of basic authentication.
    """

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")

    def read_runs(self, labels: Mapping[str, str], seconds: int) -> dict[ScrapeTarget, list[Reading]]:
        """Read what Prometheus recently scraped from runs.

        Args:
            labels: Labels that the series must have, such as `{"namespace": "team-a"}`.
            seconds: Time range before now.

        Returns:
            The scrapes of each process in chronological order, with their times.

        Raises:
            SettingError: If the server denies access or is not Prometheus.
            UnavailableError: If the server can't be reached.
        """
        # Raw samples have the times of the scrapes, so that rates need no second query. The controller's series of
        # TransferJobs come from another process.
        series_selector = f'__name__=~"{PREFIX}.+",__name__!~".+_(bucket|created)|{PREFIX}transferjob_.+",run!=""'
        matchers = ",".join([series_selector, *(f"{name}={json.dumps(value)}" for name, value in labels.items())])
        scrapes: dict[ScrapeTarget, dict[float, list[Sample]]] = {}
        for series in self._query(f"{{{matchers}}}[{seconds}s]"):
            metric = series["metric"]
            target = ScrapeTarget(metric["run"], *(metric.get(name, "") for name in ("namespace", "pod", "instance")))
            for at, value in series["values"]:
                sample = Sample(metric["__name__"], metric, float(value))
                scrapes.setdefault(target, {}).setdefault(float(at), []).append(sample)
        return {
            target: [Reading(at, tuple(samples)) for at, samples in sorted(times.items())]
            for target, times in scrapes.items()
        }

    def _query(self, query: str) -> list[dict[str, Any]]:
        url = f"{self._url}/api/v1/query?{urlencode({'query': query})}"
        response = _get(url, QUERY_TIMEOUT_SECONDS, MAX_RESPONSE_BYTES, accept="application/json")
        server = without_credentials(self._url)
        if response.status in {401, 403}:
            raise SettingError(
                f"Prometheus at {server} denies access (HTTP {response.status}). Add USER:PASSWORD@ before the host in "
                "the URL, or bypass its proxy with kubectl port-forward."
            )
        try:
            content = json.loads(response.text)
            if content["status"] == "success" and content["data"]["resultType"] == "matrix":
                return list(content["data"]["result"])
            error = str(content.get("error"))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise SettingError(
                f"{server} is not Prometheus: it answers with HTTP {response.status} ({_excerpt(response.text)}). Use "
                "the URL of its web page, including the path if it has one."
            ) from None
        message = f"Prometheus at {server} could not run the query (HTTP {response.status}: {_excerpt(error)})."
        raise UnavailableError(f"{message} Try again later.") if response.status >= 500 else SettingError(message)


class _Response(NamedTuple):
    status: int
    text: str


class _Watchdog:
    """Ends a connection after some time: the timeout of a socket starts again with each byte that arrives."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._timers = seconds, list[threading.Timer]()

    def watch(self, pool: urllib3.HTTPConnectionPool) -> None:
        """Watch the connections that a pool opens from now on."""
        watchdog, connection_class = self, pool.ConnectionCls

        class Connection(connection_class):  # type: ignore[misc, valid-type]
            def connect(self) -> None:
                super().connect()
                watchdog._start(self.sock)

        pool.ConnectionCls = Connection

    def stop(self) -> None:
        for timer in self._timers:
            timer.cancel()

    def _start(self, connected: socket.socket) -> None:
        timer = threading.Timer(self._seconds, self._end, [connected])
        timer.daemon = True
        timer.start()
        self._timers.append(timer)

    @staticmethod
    def _end(connected: socket.socket) -> None:
        with suppress(OSError):
            connected.shutdown(socket.SHUT_RDWR)


def _get(url: str, seconds: float, max_bytes: int, accept: str) -> _Response:
    """Send one GET request, without a proxy, and without following redirects, which usually lead to a login page."""
    bare_url, headers = _split_credentials(url)
    headers["Accept"] = accept
    watchdog, deadline = _Watchdog(seconds), time.monotonic() + seconds
    try:
        with urllib3.PoolManager(retries=False, timeout=seconds) as manager:
            pool = manager.connection_from_url(bare_url)
            watchdog.watch(pool)
            path = urllib3.util.parse_url(bare_url).request_uri
            response = pool.urlopen("GET", path, headers=headers, redirect=False, preload_content=False)
            data = response.read(max_bytes)
            is_too_large = bool(response.read(1))
            response.release_conn()
    except urllib3.exceptions.LocationValueError:
        raise _not_a_url(url) from None
    except (urllib3.exceptions.HTTPError, OSError) as error:
        reason = _root_cause(error) if time.monotonic() < deadline else "timed out"
        raise UnavailableError(f"{without_credentials(url)} does not answer ({reason}).") from error
    finally:
        watchdog.stop()
    if time.monotonic() >= deadline:  # a response without a length ends where the connection ends
        raise UnavailableError(f"{without_credentials(url)} does not answer (timed out).")
    if is_too_large:
        raise SettingError(
            f"{without_credentials(url)} answers with more than {max_bytes >> 20} MiB, so it does not serve "
            "metrics. Check the URL."
        )
    return _Response(int(response.status), data.decode(errors="replace"))


def _split_credentials(url: str) -> tuple[str, dict[str, str]]:
    """Return the URL without user and password, and the headers that carry them."""
    try:
        parts = urlsplit(url)
    except ValueError:  # such as an incomplete IPv6 address
        raise _not_a_url(url) from None
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise _not_a_url(url)
    if parts.username is None:
        return url, {}
    check_plain_http(url, f"The URL {without_credentials(url)} with a password")
    credentials = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    bare_url = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
    return bare_url, {"Authorization": "Basic " + base64.b64encode(credentials.encode()).decode()}


def without_credentials(url: str) -> str:
    """Return a URL for messages, without user, password and query."""
    scheme, separator, rest = url.partition("?")[0].partition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}" if separator else scheme


def _not_a_url(url: str) -> SettingError:
    return SettingError(f"{without_credentials(url)} is not a URL: expected http://HOST:PORT or https://HOST.")


def _excerpt(text: str) -> str:
    line = " ".join(text.split()) or "empty response"
    return line if len(line) <= MAX_EXCERPT_CHARACTERS else line[:MAX_EXCERPT_CHARACTERS] + "…"


def _root_cause(error: BaseException) -> str:
    """Return the innermost message: `Connection refused` is clearer than the exceptions that wrap it."""
    inner: BaseException = error
    while (cause := inner.__cause__ or inner.__context__) is not None:
        inner = cause
    if isinstance(inner, TimeoutError | urllib3.exceptions.TimeoutError):
        return "timed out"
    return (inner.strerror if isinstance(inner, OSError) else None) or " ".join(str(inner).split())
