"""Series of runs as others read them: off the page that a process serves, or out of Prometheus."""

import base64
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import unquote, urlencode, urlsplit, urlunsplit

import urllib3
from prometheus_client.parser import text_string_to_metric_families

from topwork.clients.url_policy import check_plain_http
from topwork.errors import SettingError, UnavailableError

PREFIX = "topwork_"
TIMEOUT_SECONDS = 5.0
PROMETHEUS_SECONDS = 20.0
# A run has about a hundred series, of some hundred bytes each.
MOST_BYTES = 64 * 2**20
LONGEST_ANSWER = 120


class Sample(NamedTuple):
    """A series and its value at a moment."""

    name: str
    labels: Mapping[str, str]
    value: float


@dataclass(frozen=True)
class Reading:
    """What one process told at a moment.

    Attributes:
        at: Unix time in seconds.
        samples: Its series whose names begin with `topwork_`.
    """

    at: float
    samples: tuple[Sample, ...]

    def value(self, name: str, **labels: str) -> float | None:
        """Value of the first series of a name (without `topwork_`) that has these labels; None without one."""
        wanted = labels.items()
        return next((sample.value for sample in self.of(name) if wanted <= sample.labels.items()), None)

    def by(self, name: str, label: str) -> dict[str, float]:
        """Values of the series of a name, by the value of a label."""
        return {sample.labels[label]: sample.value for sample in self.of(name) if label in sample.labels}

    def of(self, name: str) -> Iterator[Sample]:
        """Series of a name (without `topwork_`)."""
        return (sample for sample in self.samples if sample.name == PREFIX + name)

    def label(self, name: str) -> str | None:
        """Value of a label of the first series that has it."""
        return next((sample.labels[name] for sample in self.samples if name in sample.labels), None)


class Target(NamedTuple):
    """The process that Prometheus scraped."""

    run: str
    namespace: str
    pod: str
    instance: str


def parse_page(text: str, at: float) -> Reading:
    """Read a page of metrics in the text format of Prometheus.

    Args:
        text: The page.
        at: Unix time at which it was read, in seconds.

    Returns:
        What it tells of topwork.

    Raises:
        ValueError: If it is no such page.
    """
    found = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
    return Reading(at, tuple(Sample(one.name, one.labels, one.value) for one in found if one.name.startswith(PREFIX)))


def read_page(url: str) -> Reading:
    """Read the page of metrics at a URL.

    Args:
        url: Such as `http://127.0.0.1:9101/metrics`.

    Returns:
        What it tells of topwork.

    Raises:
        SettingError: If what answers there serves no metrics.
        UnavailableError: If nothing answers.
    """
    answer = _get(url, TIMEOUT_SECONDS, accept="text/plain;version=0.0.4")
    if answer.status != 200:
        raise SettingError(f"{shown(url)} answers with HTTP {answer.status}: metrics are below /metrics as a rule.")
    try:
        return parse_page(answer.text, time.time())
    except ValueError:
        raise SettingError(f"{shown(url)} serves no metrics ({_short(answer.text)}). Look at the address.") from None


class Prometheus:
    """The HTTP API of a Prometheus, or of what speaks as one.

    Args:
        url: Its address, with a path where it has one; user and password of basic authentication may stand in it.
    """

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")

    def readings(self, labels: Mapping[str, str], seconds: int) -> dict[Target, list[Reading]]:
        """Read what was scraped of runs lately.

        Args:
            labels: What the series must carry, such as `{"namespace": "team-a"}`.
            seconds: How far back.

        Returns:
            For each process its scrapes, the oldest first, with the times at which they were made.

        Raises:
            SettingError: If it refuses, or is no Prometheus.
            UnavailableError: If it can't be reached.
        """
        # Raw samples of a range: their times are those of the scrapes, and a second question for rates is saved.
        names = f'__name__=~"{PREFIX}.+",__name__!~".+_(bucket|created)",run!=""'
        matchers = ",".join([names, *(f"{name}={json.dumps(value)}" for name, value in labels.items())])
        series = self._ask(f"{{{matchers}}}[{seconds}s]")
        scrapes: dict[Target, dict[float, list[Sample]]] = {}
        for one in series:
            its = one["metric"]
            target = Target(its["run"], *(its.get(name, "") for name in ("namespace", "pod", "instance")))
            for at, value in one["values"]:
                sample = Sample(its["__name__"], its, float(value))
                scrapes.setdefault(target, {}).setdefault(float(at), []).append(sample)
        return {
            target: [Reading(at, tuple(samples)) for at, samples in sorted(times.items())]
            for target, times in scrapes.items()
        }

    def _ask(self, query: str) -> list[dict[str, Any]]:
        url = f"{self._url}/api/v1/query?{urlencode({'query': query})}"
        answer = _get(url, PROMETHEUS_SECONDS, accept="application/json")
        where = shown(self._url)
        if answer.status in {401, 403}:
            raise SettingError(
                f"Prometheus at {where} refuses (HTTP {answer.status}). Write USER:PASSWORD@ before the host in "
                "the address, or reach it past its proxy with kubectl port-forward."
            )
        try:
            content = json.loads(answer.text)
            if content["status"] == "success" and content["data"]["resultType"] == "matrix":
                return list(content["data"]["result"])
            told = str(content.get("error"))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise SettingError(
                f"{where} is no Prometheus: it answers with HTTP {answer.status} ({_short(answer.text)}). Give the "
                "address of its web page, with its path if it has one."
            ) from None
        failed = f"Prometheus at {where} could not answer (HTTP {answer.status}: {_short(told)})."
        raise UnavailableError(f"{failed} Try again later.") if answer.status >= 500 else SettingError(failed)


class _Answer(NamedTuple):
    status: int
    text: str


def _get(url: str, seconds: float, accept: str) -> _Answer:
    """Ask once; no proxy of the environment is used, and no redirect followed, which would lead to a login page."""
    plain, headers = _without_login(url)
    headers["Accept"] = accept
    try:
        with urllib3.PoolManager(retries=False, timeout=seconds) as pool:
            answer = pool.request("GET", plain, headers=headers, redirect=False, preload_content=False)
            data = answer.read(MOST_BYTES)
            more = bool(answer.read(1))
            answer.release_conn()
    except urllib3.exceptions.LocationValueError:
        raise SettingError(f"{shown(url)} is no address: expected http://HOST:PORT or https://HOST.") from None
    except (urllib3.exceptions.HTTPError, OSError) as error:
        raise UnavailableError(f"{shown(url)} does not answer ({_why(error)}).") from error
    if more:
        raise SettingError(f"{shown(url)} answers with more than {MOST_BYTES >> 20} MiB: it is no page of metrics.")
    return _Answer(int(answer.status), data.decode(errors="replace"))


def _without_login(url: str) -> tuple[str, dict[str, str]]:
    try:
        parts = urlsplit(url)
    except ValueError:  # such as half an IPv6 address
        parts = urlsplit("")
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise SettingError(f"{shown(url)} is no address: expected http://HOST:PORT or https://HOST.")
    if parts.username is None:
        return url, {}
    check_plain_http(url, f"The address {shown(url)} with a password")
    login = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    bare = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
    return bare, {"Authorization": "Basic " + base64.b64encode(login.encode()).decode()}


def shown(url: str) -> str:
    """Write an address for messages: without login and query."""
    scheme, there, rest = url.partition("?")[0].partition("://")
    return f"{scheme}{there}{rest.rpartition('@')[2]}" if there else scheme


def _short(text: str) -> str:
    line = " ".join(text.split()) or "nothing"
    return line if len(line) <= LONGEST_ANSWER else line[:LONGEST_ANSWER] + "…"


def _why(error: BaseException) -> str:
    """The innermost reason: `Connection refused` says more than the layers around it."""
    inner: BaseException = error
    while (below := inner.__cause__ or inner.__context__) is not None:
        inner = below
    if isinstance(inner, TimeoutError | urllib3.exceptions.TimeoutError):
        return "no answer in time"
    return (inner.strerror if isinstance(inner, OSError) else None) or " ".join(str(inner).split())
