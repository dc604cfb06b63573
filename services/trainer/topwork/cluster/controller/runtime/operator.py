"""Watch of the TransferJobs with kopf, in an event loop and a thread of its own; the only module that imports kopf.

kopf only reports events: it stores no state in annotations, sets no finalizers, posts no Kubernetes events, and reads
neither namespaces nor CustomResourceDefinitions. Its operator ends with the first unexpected response of the API server
(500 or 410 instead of a stream, a deleted CustomResourceDefinition) and is then started again.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, cast

import aiohttp
import kopf
import structlog

from topwork.clients.kubernetes import KubernetesObject
from topwork.clients.kubernetes.api_request import KINDS
from topwork.clients.kubernetes.errors import ForbiddenError
from topwork.cluster.controller.runtime.watches import EventHandler, Watch, backoff_seconds, report_once
from topwork.errors import TopworkError, UnavailableError, quote_error

if TYPE_CHECKING:
    from topwork.clients.kubernetes.cluster import Cluster

log = structlog.get_logger(__name__)

# Only kopf's peering uses it, which is off. Without it, kopf resolves the name of the host.
IDENTITY = "topwork-controller"
# The server ends a stream after a minute, and sends bookmarks before: a longer silence is a dead connection.
STREAM_SECONDS = 60
SILENCE_SECONDS = 90.0
REQUEST_SECONDS = 60.0
CONNECT_SECONDS = 10.0
RETRY_DELAYS = (1, 2, 4)
RECONNECT_SECONDS = 1.0
PAGE_SIZE = 500
# After an interruption, kopf does not report objects that were deleted in the meantime.
COMPARE_SECONDS = 600.0
COMPARE_AFTER_LIST_SECONDS = 5.0
# The longest request of `Cluster`: all attempts to reach a server that never responds.
MAX_SILENCE_SECONDS = 300.0
STABLE_SECONDS = 60.0
NOT_SERVED = "the cluster does not serve TransferJobs: install the CustomResourceDefinition with: topwork crd --apply"


class TransferJobWatch(Watch):
    """Reports all TransferJobs of a namespace, and then their changes.

    Each namespace has a kopf operator of its own: with several, kopf can fail to end after an error in one of them, and
    then watches only the others.

    Args:
        cluster: The cluster.
        namespace: Their namespace; None for all namespaces.
        handle: Called for each change.
        known: Returns the TransferJobs that were reported and not deleted since.
    """

    def __init__(
        self,
        cluster: "Cluster",
        namespace: str | None,
        handle: EventHandler,
        known: Callable[[], Iterable[KubernetesObject]],
    ) -> None:
        super().__init__("TransferJob", namespace, MAX_SILENCE_SECONDS)
        self._cluster = cluster.in_namespace(namespace) if namespace else cluster
        self._namespace, self._handle, self._known = namespace, handle, known
        self._compare_at = 0.0
        self._cancel: Callable[[], object] = lambda: None
        # kopf logs each attempt of a request. The watches of Jobs and pods report an outage once, and this module
        # reports the error that ends an operator.
        logging.getLogger("kopf").setLevel(logging.CRITICAL + 1)

    def stop(self) -> None:
        """Stop kopf, without waiting for the end of the thread."""
        super().stop()
        self._cancel()

    def _run(self) -> None:
        failures = 0
        while not self._stopping.is_set():
            started = time.monotonic()
            try:
                self._list()
                self.error, self._synced = "", True
                asyncio.run(self._operate())
                raise UnavailableError("the watch ended")
            except asyncio.CancelledError:
                return
            except TopworkError as error:
                reason = str(error)
                # One namespace without permission must not stop the others.
                self._synced |= isinstance(error, ForbiddenError)
            except Exception as error:
                reason = f"{type(error).__name__}: {quote_error(error)}"
            failures = 1 if time.monotonic() - started > STABLE_SECONDS else failures + 1
            report_once(self.name, reason, self.error)
            self.error = reason
            self._last_sign = time.monotonic()
            self._stopping.wait(backoff_seconds(failures))

    # ── Listing ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _list(self) -> None:
        """Report all TransferJobs, and those that were deleted, while kopf is not running."""
        if not self._cluster.serves("TransferJob"):
            raise UnavailableError(NOT_SERVED)
        for obj in self._forget_deleted():
            self._handle("ADDED", obj)

    def _forget_deleted(self) -> list[KubernetesObject]:
        """Report known TransferJobs that no longer exist as DELETED; return those that exist."""
        # Before the list: an object that is created in the meantime is not in it.
        known = [obj for obj in self._known() if self._namespace in (None, obj["metadata"]["namespace"])]
        listed = self._cluster.list("TransferJob", all_namespaces=self._namespace is None)
        uids = {obj["metadata"]["uid"] for obj in listed}
        for obj in known:
            if obj["metadata"]["uid"] not in uids:
                self._handle("DELETED", obj)
        return listed

    # ── kopf ────────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _operate(self) -> None:
        """Run kopf until it fails, or is stopped."""
        loop, operator = asyncio.get_running_loop(), asyncio.current_task()
        self._cancel = lambda: operator and not loop.is_closed() and loop.call_soon_threadsafe(operator.cancel)
        tasks = [asyncio.create_task(self._show_life()), asyncio.create_task(self._compare())]
        registry = kopf.OperatorRegistry()
        kind = KINDS["TransferJob"]
        kopf.on.login(registry=registry)(self._login_once())
        kopf.on.event(kind.group, kind.version, kind.plural, registry=registry)(self._on_event)
        try:
            await kopf.operator(
                registry=registry,
                settings=_kopf_settings(),
                identity=cast("Any", IDENTITY),
                standalone=True,
                clusterwide=self._namespace is None,
                namespaces=[self._namespace] if self._namespace else [],
            )
        finally:
            for task in tasks:
                task.cancel()

    async def _on_event(self, event: kopf.RawEvent, **_: Any) -> None:
        if event["type"] is None:  # an object of a list
            self._compare_at = min(self._compare_at, time.monotonic() + COMPARE_AFTER_LIST_SECONDS)
        self._handle(event["type"] or "ADDED", dict(event["object"]))

    async def _show_life(self) -> None:
        while True:
            self._last_sign = time.monotonic()
            await asyncio.sleep(1)

    async def _compare(self) -> None:
        self._compare_at = time.monotonic() + COMPARE_SECONDS
        while True:
            await asyncio.sleep(1)
            if time.monotonic() < self._compare_at:
                continue
            try:
                await asyncio.to_thread(self._forget_deleted)
            except TopworkError as error:
                log.debug("TransferJobs not compared", reason=str(error))
            self._compare_at = time.monotonic() + COMPARE_SECONDS

    def _login_once(self) -> Callable[..., Any]:
        """Return the login handler. kopf calls it again after 401, without delay: the second call ends the operator."""
        calls = 0

        async def login(**_: Any) -> kopf.AiohttpSession:
            nonlocal calls
            calls += 1
            if calls > 1:
                raise kopf.PermanentError(f"{self._cluster.server} rejected the credentials (401)")
            access = self._cluster.open_access()

            async def authenticate(
                request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType
            ) -> aiohttp.ClientResponse:
                # For each request: the token of a service account changes every hour.
                request.headers.update(self._cluster.headers)
                request.server_hostname = access.server_name
                return await handler(request)

            connector = aiohttp.TCPConnector(ssl=access.ssl_context, limit=0)
            session = aiohttp.ClientSession(connector=connector, proxy=access.proxy, middlewares=[authenticate])
            return kopf.AiohttpSession(server=access.server, aiohttp_session=session)

        return login


def _kopf_settings() -> kopf.OperatorSettings:
    settings = kopf.OperatorSettings()
    settings.posting.enabled = False
    settings.scanning.disabled = True
    # kopf would send SIGKILL to its thread.
    settings.process.ultimate_exiting_timeout = None
    settings.watching.server_timeout = STREAM_SECONDS
    settings.watching.inactivity_timeout = SILENCE_SECONDS
    settings.watching.connect_timeout = CONNECT_SECONDS
    settings.watching.reconnect_backoff = RECONNECT_SECONDS
    settings.watching.chunk_size = PAGE_SIZE
    settings.networking.request_timeout = REQUEST_SECONDS
    settings.networking.connect_timeout = CONNECT_SECONDS
    settings.networking.error_backoffs = RETRY_DELAYS
    settings.queueing.idle_timeout = 1.0
    return settings
