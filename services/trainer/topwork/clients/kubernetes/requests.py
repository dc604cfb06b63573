"""One request to an API server: sent, tried again where that can help, and its answer or its error."""

import json
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar
from urllib.parse import quote, urlencode

import urllib3
from kubernetes.client import ApiException
from kubernetes.config import ConfigException
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt

from topwork.clients.kubernetes.config import LOG_IN, ClusterSettings, open_connection, renewing
from topwork.clients.kubernetes.errors import GoneError, PassingError, Place, QuietError, broken, garbage, refused
from topwork.errors import SettingError


@dataclass(frozen=True)
class Kind:
    """Where objects of a kind lie in the API."""

    name: str
    plural: str
    group: str = ""
    namespaced: bool = True

    @property
    def api_version(self) -> str:
        """As manifests name it."""
        return f"{self.group}/v1" if self.group else "v1"


KINDS = {
    kind.name: kind
    for kind in (
        Kind("ConfigMap", "configmaps"),
        Kind("Event", "events"),
        Kind("Job", "jobs", "batch"),
        Kind("Namespace", "namespaces", namespaced=False),
        Kind("Node", "nodes", namespaced=False),
        Kind("Pod", "pods"),
        Kind("ResourceQuota", "resourcequotas"),
        Kind("Secret", "secrets"),
        Kind("ServiceAccount", "serviceaccounts"),
    )
}


@dataclass(frozen=True)
class Asked:
    """What is asked of the API server.

    Attributes:
        verb: In words: apply, read, list, watch, delete.
        kind: Kind of object.
        namespace: Namespace; empty: all.
        name: Name of the object; empty: all.
        method: HTTP method.
        part: Part of the object, such as `log`, or a path below it, such as `proxy/metrics`.
        query: Parameters; those that are None or empty are left out.
        body: Body, as a plain object.
    """

    verb: str
    kind: Kind
    namespace: str
    name: str = ""
    method: str = "GET"
    part: str = ""
    query: dict[str, Any] = field(default_factory=dict)
    body: dict[str, Any] | None = None

    @property
    def what(self) -> str:
        """In words, to follow `could not`."""
        of = f"the {self.part.rpartition('/')[2]} of {self.kind.name}" if self.part else self.kind.name
        where = f" in {self.namespace}" if self.kind.namespaced and self.namespace else ""
        return f"{self.verb} {of} {self.name}{where}" if self.name else f"{self.verb} {self.kind.plural}{where}"

    @property
    def path(self) -> str:
        """Path and query of the URL."""
        kind = self.kind
        parts = ["apis", kind.group, "v1"] if kind.group else ["api", "v1"]
        if kind.namespaced and self.namespace:
            parts += ["namespaces", self.namespace]
        parts += [each for each in (kind.plural, self.name, *self.part.split("/")) if each]
        query = urlencode({key: value for key, value in self.query.items() if value not in (None, "")})
        return "/" + "/".join(quote(part, safe="") for part in parts) + (f"?{query}" if query else "")


Answer = TypeVar("Answer")

LONGEST_PAUSE_SECONDS = 30.0
# Objects that one request lists at most.
PAGE = 500
APPLY = "application/apply-patch+yaml"


class Lines:
    """Lines of an answer that streams, as they come.

    Attributes:
        whole: Whether the stream ended as it should.
    """

    def __init__(self, response: Any, place: Place) -> None:
        self._response, self._place = response, place
        self.whole = False

    def __iter__(self) -> Iterator[str]:
        rest = b""
        try:
            for chunk in self._response.stream(None, decode_content=True):
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    yield line.decode(errors="replace")
        except urllib3.exceptions.ReadTimeoutError as error:
            raise QuietError(f"{self._place.server} fell silent when asked to {self._place.what}.") from error
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise broken(error, self._place) from error
        self.whole = True
        if rest:
            yield rest.decode(errors="replace")

    def wait_at_most(self, seconds: float) -> None:
        """Wait at most so long for the next bytes."""
        connection = getattr(self._response, "connection", None)
        if socket := getattr(connection, "sock", None):
            with suppress(OSError):
                socket.settimeout(max(seconds, 0.001))


class Api:
    """Speaks HTTP to the API server that the settings name; from several threads, too.

    Attributes:
        connection: The client in use; made anew when its login has run out.
        warnings: What the server warned of, in its words, each once.
    """

    def __init__(self, settings: ClusterSettings) -> None:
        self.settings = settings
        self.connection = open_connection(settings)
        self.warnings: list[str] = []
        self._renewal = threading.Lock()

    def ask(self, asked: Asked) -> dict[str, Any]:
        """Ask until there is an answer or the attempts are used up.

        Raises:
            SettingError: If the server refuses.
            UnavailableError: If it can't be reached or stays overloaded.
        """
        return self.insist(lambda: self.ask_once(asked))

    def insist(self, attempt: Callable[[], Answer]) -> Answer:
        """Call `attempt` again, after a growing pause, while it raises PassingError and attempts are left."""
        retrying = Retrying(
            retry=retry_if_exception(_passes),
            stop=stop_after_attempt(self.settings.attempts),
            wait=self._pause,
            reraise=True,
        )
        return retrying(attempt)

    def _pause(self, state: RetryCallState) -> float:
        return self.pause(state.attempt_number, state.outcome.exception() if state.outcome else None)

    def pause(self, failures: int, error: BaseException | None) -> float:
        """Seconds to wait after so many failures in a row: what the server asked for, or more each time.

        Args:
            failures: How many; at least 1.
            error: The last one.
        """
        asked = getattr(error, "retry_after", None)
        # Spread by chance, so that many clients of one server do not come back together.
        growing = self.settings.pause_seconds * 2 ** (failures - 1) * random.uniform(0.75, 1.25)  # noqa: S311
        return float(min(growing if asked is None else asked, LONGEST_PAUSE_SECONDS))

    def place(self, asked: Asked) -> Place:
        """Where a request goes, for messages."""
        namespace = asked.namespace or self.connection.namespace
        return Place(self.connection.server, self.connection.login, namespace, asked.what)

    def ask_once(self, asked: Asked) -> dict[str, Any]:
        """Ask without another try.

        Raises:
            PassingError: If another try may help.
            SettingError: If the server refuses.
        """
        response = self._send(asked, self.settings.timeout_seconds)
        place = self.place(asked)
        try:
            body = bytes(response.read())
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise broken(error, place) from error
        if not 200 <= response.status < 300:
            raise refused(response.status, body, response.headers, place)
        try:
            content = json.loads(body)
        except ValueError:
            content = None
        if not isinstance(content, dict) or "kind" not in content:
            raise garbage(body, place)
        return content

    def items(self, asked: Asked) -> tuple[list[dict[str, Any]], str]:
        """List objects, page by page.

        Returns:
            The objects, and the version of the cluster that they show.
        """
        for _ in range(self.settings.attempts - 1):
            with suppress(GoneError):  # it took longer than the server keeps a version: from the beginning
                return self._pages(asked)
        return self._pages(asked)

    def _pages(self, asked: Asked) -> tuple[list[dict[str, Any]], str]:
        named = {"apiVersion": asked.kind.api_version, "kind": asked.kind.name}  # items of a list leave it out
        found: list[dict[str, Any]] = []
        token = ""
        while True:
            page = self.ask(replace(asked, query=asked.query | {"limit": PAGE, "continue": token}))
            found += [named | item for item in page.get("items") or []]
            token = page["metadata"].get("continue", "")
            if not token:
                return found, page["metadata"].get("resourceVersion", "")

    @contextmanager
    def stream(self, asked: Asked, read_seconds: float) -> Iterator[Lines]:
        """Open an answer that streams; not tried again.

        Args:
            asked: The request.
            read_seconds: Silence after which the stream is given up.

        Raises:
            PassingError: If it can't be opened now.
            SettingError: If the server refuses.
        """
        response = self._send(asked, read_seconds)
        place = self.place(asked)
        try:
            if not 200 <= response.status < 300:
                try:
                    body = bytes(response.read())
                except (urllib3.exceptions.HTTPError, OSError) as error:
                    raise broken(error, place) from error
                raise refused(response.status, body, response.headers, place)
            lines = Lines(response, place)
            yield lines
        finally:
            response.close()

    def _send(self, asked: Asked, read_seconds: float) -> Any:
        """Send once; once more where a fresh login may help."""
        used = self.connection
        before = used.credentials
        response = self._send_once(asked, read_seconds)
        if response.status != 401:
            return response
        with self._renewal:  # another thread may have been quicker
            if self.connection is used and used.credentials == before:
                self.connection = open_connection(self.settings)
        if self.connection.credentials == before:
            return response
        response.close()
        return self._send_once(asked, read_seconds)

    def _send_once(self, asked: Asked, read_seconds: float) -> Any:
        client = self.connection.client
        headers = {"Accept": "application/json"}
        if asked.body is not None:
            headers["Content-Type"] = APPLY if asked.method == "PATCH" else "application/json"
        try:
            with renewing(f"The login of {self.connection.login}"):  # the client does it, when a token is about to end
                request = client.param_serialize(
                    asked.method, asked.path, header_params=headers, body=asked.body, auth_settings=["BearerToken"]
                )
            response = client.call_api(*request, _request_timeout=(self.settings.timeout_seconds, read_seconds))
        except (urllib3.exceptions.HTTPError, ApiException, OSError) as error:
            raise broken(error, self.place(asked)) from error
        except ConfigException as error:  # such as the token of a pod that is no longer there
            said = str(error).rstrip(".")
            raise SettingError(f"The login of {self.connection.login} failed: {said}. {LOG_IN}") from error
        except ValueError:  # its text would be the token
            raise SettingError(
                f"The token of {self.connection.login} holds a newline or another character that none may hold. "
                f"{LOG_IN}"
            ) from None
        self._note(response.headers.getlist("Warning"))
        return response.response

    def _note(self, warnings: list[str]) -> None:
        """Keep the text of `299 - "text"`."""
        for warning in warnings:
            text = warning.partition('"')[2].rpartition('"')[0].replace('\\"', '"')
            if text and text not in self.warnings:
                self.warnings.append(text)


def _passes(error: BaseException) -> bool:
    return isinstance(error, PassingError) and not isinstance(error, GoneError)
