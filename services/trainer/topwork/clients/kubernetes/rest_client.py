"""HTTP requests to the API server: retries, renewed credentials, pagination and streamed responses."""

# Requests go through kubernetes.client.ApiClient, which serializes, authenticates and sends them. Its typed methods,
# its dynamic client and its retries are not used: the dynamic client sends discovery requests before the first real
# one, writes a cache file to /tmp and does not quote names in URLs; the client has no pagination; and whether an error
# is worth a retry (409 from a concurrent write, but not 500 from an admission webhook) depends on its `Status`.

import json
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any, TypeVar

import urllib3
from kubernetes.client import ApiException
from kubernetes.config import ConfigException
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt

from topwork.clients.kubernetes import KubernetesObject
from topwork.clients.kubernetes.api_request import ApiRequest
from topwork.clients.kubernetes.connection import ClusterSettings, open_connection
from topwork.clients.kubernetes.errors import (
    LOG_IN,
    IdleTimeoutError,
    RequestContext,
    ResourceExpiredError,
    TransientError,
    connection_error,
    response_error,
    unexpected_response_error,
)
from topwork.errors import SettingError

MAX_BACKOFF_SECONDS = 30.0
PAGE_SIZE = 500
APPLY_PATCH = "application/apply-patch+yaml"
Result = TypeVar("Result")


class LineStream:
    """Lines of a streamed response, as they arrive.

    The official Watch drops a last line without a newline, and can't change its read timeout while it streams.
    """

    def __init__(self, response: Any, context: RequestContext) -> None:
        self._response, self._context = response, context

    def __iter__(self) -> Iterator[str]:
        rest = b""
        try:
            for chunk in self._response.stream(None, decode_content=True):
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    yield line.decode(errors="replace")
        except urllib3.exceptions.ReadTimeoutError as error:
            message = f"{self._context.server} sent no data after the request to {self._context.action}."
            raise IdleTimeoutError(message) from error
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise connection_error(error, self._context) from error
        if rest:
            yield rest.decode(errors="replace")

    def set_read_timeout(self, seconds: float) -> None:
        """Change the timeout for the next bytes."""
        connection = getattr(self._response, "connection", None)
        if socket := getattr(connection, "sock", None):
            with suppress(OSError):
                socket.settimeout(max(seconds, 0.001))


class RestClient:
    """Sends requests to an API server. Thread-safe.

    Args:
        settings: Selects the cluster, and sets timeouts and retries.

    Attributes:
        connection: The current connection; replaced when its credentials expire.
        warnings: Warnings from the server, without duplicates.

    Raises:
        SettingError: If there is no configuration, or it can't be used.
    """

    def __init__(self, settings: ClusterSettings) -> None:
        self.settings = settings
        self.connection = open_connection(settings)
        self.warnings: list[str] = []
        self._renewal_lock = threading.Lock()

    def send(self, request: ApiRequest) -> KubernetesObject:
        """Send a request and return the response; retry transient errors.

        Raises:
            SettingError: If the server rejects the request.
            UnavailableError: If the server is unreachable or overloaded on every attempt.
        """
        return self.retry(lambda: self.send_once(request))

    def retry(self, attempt: Callable[[], Result]) -> Result:
        """Call a function again, with growing delays, while it raises TransientError and attempts are left."""
        retrying = Retrying(
            retry=retry_if_exception(_is_retryable),
            stop=stop_after_attempt(self.settings.attempts),
            wait=self._retry_delay,
            reraise=True,
        )
        return retrying(attempt)

    def _retry_delay(self, state: RetryCallState) -> float:
        return self.backoff_seconds(state.attempt_number, state.outcome.exception() if state.outcome else None)

    def backoff_seconds(self, failures: int, error: BaseException | None) -> float:
        """Return the delay before the next attempt: the server's Retry-After, or exponential backoff with jitter.

        Args:
            failures: Consecutive failures, at least 1.
            error: The last failure.

        Returns:
            Seconds, at most `MAX_BACKOFF_SECONDS`.
        """
        retry_after = getattr(error, "retry_after", None)
        # Jitter, so that clients of one server don't retry at the same moment.
        backoff = self.settings.backoff_seconds * 2 ** (failures - 1) * random.uniform(0.75, 1.25)  # noqa: S311
        return float(min(backoff if retry_after is None else retry_after, MAX_BACKOFF_SECONDS))

    def describe(self, request: ApiRequest) -> RequestContext:
        """Describe a request for error messages."""
        namespace = request.namespace or self.connection.namespace
        return RequestContext(self.connection.server, self.connection.identity, namespace, request.action)

    def send_once(self, request: ApiRequest) -> KubernetesObject:
        """Send a request without retries.

        Raises:
            TransientError: If a retry may help.
            SettingError: If the server rejects the request.
        """
        response = self._send(request, self.settings.timeout_seconds)
        context = self.describe(request)
        body = _read_body(response, context)
        try:
            content = json.loads(body)
        except ValueError:
            content = None
        if not isinstance(content, dict) or "kind" not in content:
            raise unexpected_response_error(body, context)
        return content

    def list_all(self, request: ApiRequest) -> tuple[list[KubernetesObject], str]:
        """List objects, page by page.

        Returns:
            The objects, and the resourceVersion of the list.
        """
        for _ in range(self.settings.attempts - 1):
            with suppress(ResourceExpiredError):  # the server no longer has this version of the list: start over
                return self._list_pages(request)
        return self._list_pages(request)

    def _list_pages(self, request: ApiRequest) -> tuple[list[KubernetesObject], str]:
        type_fields = {"apiVersion": request.kind.api_version, "kind": request.kind.name}  # omitted in list items
        objects: list[KubernetesObject] = []
        token = ""
        while True:
            page = self.send(replace(request, query=request.query | {"limit": PAGE_SIZE, "continue": token}))
            objects += [type_fields | item for item in page.get("items") or []]
            token = page["metadata"].get("continue", "")
            if not token:
                return objects, page["metadata"].get("resourceVersion", "")

    @contextmanager
    def stream(self, request: ApiRequest, read_timeout_seconds: float) -> Iterator[LineStream]:
        """Open a streamed response, without retries.

        Args:
            request: The request.
            read_timeout_seconds: Timeout for the next bytes.

        Raises:
            TransientError: If a retry may help.
            SettingError: If the server rejects the request.
        """
        response = self._send(request, read_timeout_seconds)
        context = self.describe(request)
        try:
            if not _is_success(response):
                _read_body(response, context)
            yield LineStream(response, context)
        finally:
            response.close()

    def _send(self, request: ApiRequest, read_timeout_seconds: float) -> Any:
        """Send a request; after 401, log in again and send it once more if the credentials changed."""
        connection = self.connection
        credentials = connection.credentials
        response = self._send_with_credentials(request, read_timeout_seconds)
        if response.status != 401:
            return response
        with self._renewal_lock:  # another thread may have logged in already
            if self.connection is connection and connection.credentials == credentials:
                self.connection = open_connection(self.settings)
        if self.connection.credentials == credentials:
            return response
        response.close()
        return self._send_with_credentials(request, read_timeout_seconds)

    def _send_with_credentials(self, request: ApiRequest, read_timeout_seconds: float) -> Any:
        connection = self.connection
        headers = {"Accept": "application/json"}
        if request.body is not None:
            headers["Content-Type"] = APPLY_PATCH if request.method == "PATCH" else "application/json"
        try:
            serialized = connection.client.param_serialize(
                request.method,
                request.path,
                path_params=request.path_params,
                query_params=request.query_params,
                header_params=headers,
                body=request.body,
                auth_settings=["BearerToken"],
            )
            timeouts = (self.settings.timeout_seconds, read_timeout_seconds)
            response = connection.client.call_api(*serialized, _request_timeout=timeouts)
        except (urllib3.exceptions.HTTPError, ApiException, OSError) as error:
            raise connection_error(error, self.describe(request)) from error
        except ConfigException as error:  # such as a pod's token file that no longer exists
            message = str(error).rstrip(".")
            raise SettingError(f"Login of {connection.identity} failed: {message}. {LOG_IN}") from error
        except ValueError:  # its message would contain the token
            raise SettingError(
                f"The token of {connection.identity} contains a newline or another character that is not allowed in "
                f"an HTTP header. {LOG_IN}"
            ) from None
        self._record_warnings(response.headers.getlist("Warning"))
        return response.response

    def _record_warnings(self, headers: list[str]) -> None:
        for header in headers:
            text = header.partition('"')[2].rpartition('"')[0].replace('\\"', '"')  # 299 - "text"
            if text and text not in self.warnings:
                self.warnings.append(text)


def _is_success(response: Any) -> bool:
    return bool(200 <= response.status < 300)


def _read_body(response: Any, context: RequestContext) -> bytes:
    """Read a response; raises the error that it reports if it is not a success."""
    try:
        body = bytes(response.read())
    except (urllib3.exceptions.HTTPError, OSError) as error:
        raise connection_error(error, context) from error
    if not _is_success(response):
        raise response_error(response.status, body, response.headers, context)
    return body


def _is_retryable(error: BaseException) -> bool:
    return isinstance(error, TransientError) and not isinstance(error, ResourceExpiredError)
