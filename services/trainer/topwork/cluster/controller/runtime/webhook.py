"""Validating webhook: `kubectl apply` shows the same problems of an object as `topwork validate`.

Problems are found twice: here, and by the controller, which sets the condition Accepted of what was applied without the
webhook. So whenever the webhook can't decide in time, it accepts the object.
"""

# kopf's admission server is not used: its path contains the name of a Python function, it does not reload certificates,
# its self-signed ones need the unmaintained packages certbuilder and oscrypto, and it is down while kopf restarts.

import asyncio
import socket
import ssl
import threading
import time
from collections.abc import Callable

import structlog
from aiohttp import web

from topwork.clients.kubernetes import KubernetesObject
from topwork.cluster.controller.runtime.certificates import Certificates
from topwork.cluster.controller.runtime.http_server import open_listener
from topwork.cluster.controller.runtime.watches import thread_problem
from topwork.cluster.controller.searches.search_cache import SEARCH
from topwork.cluster.manifests.transfer_job import parse_transfer_job
from topwork.cluster.manifests.transfer_search import parse_transfer_search
from topwork.errors import SpecError, TopworkError
from topwork.spec.loading.defaults import SpecDefaults

log = structlog.get_logger(__name__)

PATH = "/validate"
DefaultsReader = Callable[[str], SpecDefaults | None]
"""Returns the defaults of a namespace. Its requests must time out well within `ANSWER_SECONDS`."""
# timeoutSeconds of the ValidatingWebhookConfiguration is 5.
ANSWER_SECONDS = 4.0
# The API server limits objects to 1.5 MB; a request contains the new and the old one.
MAX_REQUEST_BYTES = 8 * 1024**2
MAX_MESSAGE_CHARACTERS = 32 * 1024
RETRY_SECONDS = 10.0
MAX_SILENCE_SECONDS = 600.0
UNPROCESSABLE = 422


def review(request: KubernetesObject, read_defaults: DefaultsReader) -> KubernetesObject:
    """Answer an AdmissionReview of a TransferJob or a TransferSearch.

    Args:
        request: The AdmissionReview.
        read_defaults: Reads the defaults of a namespace.

    Returns:
        The AdmissionReview with the response: allowed, or denied with all problems of the spec.
    """
    content = request["request"]
    response: KubernetesObject = {"uid": content["uid"], "allowed": True}
    if problems := _problems(content, read_defaults):
        response["allowed"] = False
        response["status"] = {"code": UNPROCESSABLE, "message": problems[:MAX_MESSAGE_CHARACTERS]}
    return _review(response)


def _problems(content: KubernetesObject, read_defaults: DefaultsReader) -> str:
    obj, old = content.get("object"), content.get("oldObject")
    # A spec that was applied without the webhook can be invalid: its labels, annotations and finalizers can be changed,
    # and its run suspended.
    is_unchanged = obj and old and _unsuspended(obj) == _unsuspended(old)
    if not obj or is_unchanged or content.get("subResource") or obj["metadata"].get("deletionTimestamp"):
        return ""
    try:
        defaults = read_defaults(content.get("namespace") or "")
    except TopworkError as error:
        # Without the defaults of the namespace, a missing spec.storage would be a wrong answer.
        log.warning("object not validated: the defaults of its namespace are unknown", reason=str(error))
        return ""
    parse = parse_transfer_search if obj.get("kind") == SEARCH else parse_transfer_job
    try:
        parse(obj, defaults)
    except SpecError as error:
        return str(error)
    return ""


def _unsuspended(obj: KubernetesObject) -> KubernetesObject:
    return {key: value for key, value in obj["spec"].items() if key != "suspend"}


class WebhookServer:
    """HTTPS server of the webhook, in an event loop and a thread of its own.

    Args:
        port: TCP port; 0 selects a free port.
        certificates: Its certificate.
        read_defaults: Reads the defaults of a namespace.
        refresh_seconds: Time between two checks of the certificate.

    Attributes:
        error: Why it can't serve at the moment; empty if it serves.
        port: The port, once it listens.
    """

    def __init__(
        self, port: int, certificates: Certificates, read_defaults: DefaultsReader, refresh_seconds: float
    ) -> None:
        self.port, self.error = port, "webhook: the certificate is not loaded yet"
        self._certificates, self._read_defaults = certificates, read_defaults
        self._refresh_seconds = refresh_seconds
        self._context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self._last_sign = time.monotonic()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Listen on the port.

        Raises:
            SettingError: If the port is in use or not permitted.
        """
        listener = open_listener(self.port, "--webhook-port")
        self.port = int(listener.getsockname()[1])
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(listener)), name="webhook", daemon=True)
        self._thread.start()

    def problem(self) -> str | None:
        """Return whether the thread is dead or stuck; None if it works."""
        return thread_problem(self._thread, self._last_sign, MAX_SILENCE_SECONDS) if self._thread else None

    async def _serve(self, listener: socket.socket) -> None:
        application = web.Application(client_max_size=MAX_REQUEST_BYTES)
        application.router.add_post(PATH, self._answer)
        runner = web.AppRunner(application, access_log=None)
        await runner.setup()
        await web.SockSite(runner, listener, ssl_context=self._context).start()
        while True:
            await self._refresh()
            await asyncio.sleep(min(self._refresh_seconds, RETRY_SECONDS) if self.error else self._refresh_seconds)

    async def _refresh(self) -> None:
        self._last_sign = time.monotonic()
        try:
            await asyncio.to_thread(self._certificates.refresh, self._context)
        except TopworkError as error:
            if str(error) != self.error:
                log.warning("certificate not refreshed", reason=str(error))
            self.error = str(error)
        else:
            self.error = ""

    async def _answer(self, request: web.Request) -> web.Response:
        try:
            content = await request.json()
            uid = content["request"]["uid"]
        except (ValueError, LookupError, TypeError) as error:
            raise web.HTTPBadRequest(text="expected an AdmissionReview") from error
        try:
            answer = asyncio.to_thread(review, content, self._read_defaults)
            return web.json_response(await asyncio.wait_for(answer, ANSWER_SECONDS))
        except TimeoutError:
            warning = "topwork did not validate this object in time; its condition Accepted shows the result"
        except Exception:
            log.exception("unexpected error of the webhook")
            warning = "topwork could not validate this object; its condition Accepted shows the result"
        return web.json_response(_review({"uid": uid, "allowed": True, "warnings": [warning]}))


def _review(response: KubernetesObject) -> KubernetesObject:
    return {"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "response": response}
