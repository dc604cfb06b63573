"""Pushing the outcome of a run to a Pushgateway, and deleting it from there."""

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
from topwork.clients.url_policy import check_plain_http, is_forbidden_host
from topwork.errors import SettingError, UnavailableError

JOB = "topwork"
"""Label `job` of all groups, which a Pushgateway requires. Runs are distinguished by `transferjob` and `run`."""
TIMEOUT_SECONDS = 5.0
MAX_ERROR_CHARACTERS = 300

Result = TypeVar("Result")


def push_outcome(gateway: str, metrics: Metrics, *, seconds: float = TIMEOUT_SECONDS) -> None:
    """Push the outcome of a run, replacing an earlier outcome of the same run. Only node 0 pushes.

    Args:
        gateway: URL of the Pushgateway, `http(s)://host:port`, with a path if it has one.
        metrics: The metrics of the process; only the outcome series are sent.
        seconds: Timeout.

    Raises:
        SettingError: If the URL is not a permitted one.
        UnavailableError: If the Pushgateway can't be reached, rejects the request, or does not answer in time.
    """
    _check_url(gateway)
    if not metrics.is_chief:
        return

    def push() -> None:
        push_to_gateway(gateway, JOB, metrics.outcome_registry, metrics.labels, timeout=seconds)

    _call_with_timeout(gateway, push, seconds)


def delete_outcome(gateway: str, run: str, *, seconds: float = TIMEOUT_SECONDS) -> bool:
    """Delete all groups of a run.

    Args:
        gateway: URL of the Pushgateway, as for `push_outcome`.
        run: Name of the run.
        seconds: Timeout of each request.

    Returns:
        Whether there was anything to delete.

    Raises:
        SettingError: If the URL is not a permitted one.
        UnavailableError: If the Pushgateway can't be reached, rejects a request, or does not answer in time.
    """
    _check_url(gateway)
    groups = _call_with_timeout(gateway, lambda: _list_groups(gateway, seconds), seconds)
    matching = [labels for labels in groups if labels.get("job") == JOB and labels.get("run") == run]
    for labels in matching:
        key = {name: value for name, value in labels.items() if name != "job"}
        _call_with_timeout(gateway, partial(delete_from_gateway, gateway, JOB, key, timeout=seconds), seconds)
    return bool(matching)


def list_outcomes(gateway: str, job: str, *, seconds: float = TIMEOUT_SECONDS) -> list[str]:
    """List the runs of a job of which the Pushgateway has an outcome.

    Args:
        gateway: URL of the Pushgateway, as for `push_outcome`.
        job: `metadata.name` of the job.
        seconds: Timeout.

    Returns:
        The names of the runs, sorted.

    Raises:
        SettingError: If the URL is not a permitted one.
        UnavailableError: If the Pushgateway can't be reached, rejects the request, or does not answer in time.
    """
    _check_url(gateway)
    groups = _call_with_timeout(gateway, lambda: _list_groups(gateway, seconds), seconds)
    return sorted({labels.get("run", "") for labels in groups if _belongs_to_job(labels, job)})


def _belongs_to_job(labels: dict[str, str], job: str) -> bool:
    return labels.get("job") == JOB and labels.get("transferjob") == job


def _list_groups(gateway: str, seconds: float) -> list[dict[str, str]]:
    """List the grouping keys. https://github.com/prometheus/pushgateway#query-api."""
    request = Request(f"{gateway.rstrip('/')}/api/v1/metrics")  # noqa: S310 - the scheme is checked
    with urlopen(request, timeout=seconds) as response:  # noqa: S310
        return [group["labels"] for group in json.load(response)["data"]]


def _check_url(gateway: str) -> None:
    if not gateway.startswith(("http://", "https://")):
        raise SettingError(f"The Pushgateway {gateway!r} is not a URL. Expected http(s)://host:port.")
    host = Request(gateway).host or ""  # noqa: S310 - not opened
    if is_forbidden_host(host.rpartition(":")[0].strip("[]") or host):
        raise SettingError(
            f"The Pushgateway {gateway} is a link-local address or a cloud metadata service, where no Pushgateway "
            "runs. Use another URL."
        )
    check_plain_http(gateway, f"The Pushgateway {gateway}")


def _call_with_timeout(gateway: str, call: Callable[[], Result], seconds: float) -> Result:
    """Call in a thread: a socket timeout limits neither name resolution nor a response that arrives byte by byte."""
    results: list[Any] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            results.append(call())
        except Exception as error:  # reported by the calling thread
            errors.append(error)

    thread = threading.Thread(target=run, name="pushgateway", daemon=True)
    thread.start()
    thread.join(seconds)
    if results:
        return results[0]  # type: ignore[no-any-return]
    raise _as_unavailable(gateway, errors[0] if errors else None, seconds)


def _as_unavailable(gateway: str, error: Exception | None, seconds: float) -> UnavailableError:
    if error is None:
        return UnavailableError(f"The Pushgateway {gateway} did not answer within {seconds:g} s.")
    if isinstance(error, HTTPError):
        with error:
            message = error.read(MAX_ERROR_CHARACTERS).decode(errors="replace").strip() or error.reason
        return UnavailableError(f"The Pushgateway {gateway} rejected the request with HTTP {error.code}: {message}")
    if isinstance(error, OSError | http.client.HTTPException):
        return UnavailableError(f"The Pushgateway {gateway} can't be reached: {getattr(error, 'reason', error)}.")
    return UnavailableError(f"{gateway} does not answer like a Pushgateway: {type(error).__name__}: {error}.")
