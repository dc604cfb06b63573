"""What came of a run, at a Pushgateway: it keeps that when the process is gone, until somebody deletes it."""

import http.client
import json
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from prometheus_client import delete_from_gateway, push_to_gateway

from topwork.clients.prometheus.metrics import Metrics
from topwork.clients.url_policy import check_plain_http, is_forbidden
from topwork.errors import SettingError, UnavailableError

JOB = "topwork"
"""Label `job` of all groups, which a Pushgateway demands; those of a run differ by `transferjob` and `run`."""
TIMEOUT_SECONDS = 5.0
MOST_CHARACTERS = 300

Result = TypeVar("Result")


def push(gateway: str, metrics: Metrics, *, seconds: float = TIMEOUT_SECONDS) -> None:
    """Put what came of a job in the place of what stood for its run before.

    Args:
        gateway: `http(s)://host:port`, with a path where it has one.
        metrics: The series of the process; those of its outcome are sent.
        seconds: Time that it may take; whatever is late is left to itself.

    Raises:
        SettingError: If the address is none that metrics may be sent to.
        UnavailableError: If it can't be reached, refuses, or is too slow.
    """
    _check(gateway)

    def put() -> None:
        push_to_gateway(gateway, JOB, metrics.outcome, metrics.labels, timeout=seconds)

    _answered(gateway, put, seconds)


def delete(gateway: str, run: str, *, seconds: float = TIMEOUT_SECONDS) -> bool:
    """Delete all that stands for a run.

    Args:
        gateway: As with `push`.
        run: Name of the run.
        seconds: Time that each question may take.

    Returns:
        Whether there was anything.

    Raises:
        SettingError: If the address is none of a Pushgateway.
        UnavailableError: If it can't be reached, refuses, or is too slow.
    """
    _check(gateway)
    groups = _answered(gateway, lambda: _groups(gateway, seconds), seconds)
    found = [labels for labels in groups if labels.get("job") == JOB and labels.get("run") == run]
    for labels in found:
        key = {name: value for name, value in labels.items() if name != "job"}
        _answered(gateway, partial(delete_from_gateway, gateway, JOB, key, timeout=seconds), seconds)
    return bool(found)


def _groups(gateway: str, seconds: float) -> list[dict[str, str]]:
    """List the grouping keys. https://github.com/prometheus/pushgateway#query-api."""
    request = Request(f"{gateway.rstrip('/')}/api/v1/metrics")  # noqa: S310 - the scheme is checked
    with urlopen(request, timeout=seconds) as answer:  # noqa: S310
        return [group["labels"] for group in json.load(answer)["data"]]


def _check(gateway: str) -> None:
    if not gateway.startswith(("http://", "https://")):
        raise SettingError(f"The Pushgateway {gateway!r} is no address. Expected http(s)://host:port.")
    host = Request(gateway).host or ""  # noqa: S310 - not opened
    if is_forbidden(host.rpartition(":")[0].strip("[]") or host):
        raise SettingError(f"The Pushgateway {gateway} is a cloud's own address, where none runs. Name another.")
    check_plain_http(gateway, f"The Pushgateway {gateway}")


def _answered(gateway: str, ask: Callable[[], Result], seconds: float) -> Result:
    """Ask in a thread of its own: the time-out of a socket bounds neither the look-up of a name nor slow drops."""
    answers: list[Any] = []
    failures: list[Exception] = []

    def run() -> None:
        try:
            answers.append(ask())
        except Exception as error:  # whatever it is, it is told, and ends nothing but this thread
            failures.append(error)

    thread = threading.Thread(target=run, name="pushgateway", daemon=True)
    thread.start()
    thread.join(seconds)
    if answers:
        return answers[0]  # type: ignore[no-any-return]
    raise _failure(gateway, failures[0] if failures else None, seconds)


def _failure(gateway: str, error: Exception | None, seconds: float) -> UnavailableError:
    if error is None:
        return UnavailableError(f"The Pushgateway {gateway} did not answer within {seconds:g} s.")
    if isinstance(error, HTTPError):
        with error:
            said = error.read(MOST_CHARACTERS).decode(errors="replace").strip() or error.reason
        return UnavailableError(f"The Pushgateway {gateway} refused with {error.code}: {said}")
    if isinstance(error, OSError | http.client.HTTPException):
        return UnavailableError(f"The Pushgateway {gateway} can't be reached: {getattr(error, 'reason', error)}.")
    return UnavailableError(f"{gateway} does not answer as a Pushgateway does: {type(error).__name__}: {error}.")
