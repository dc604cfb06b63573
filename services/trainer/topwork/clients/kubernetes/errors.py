"""What an API server refuses, said in the one line that a user needs: the other half of `edge.kubernetes`."""

import json
import re
import ssl
from dataclasses import dataclass
from typing import Any

from topwork.errors import SettingError, TopworkError, UnavailableError

RBAC = re.compile(r'User "(?P<user>[^"]*)" cannot (?P<verb>\S+) resource "(?P<resource>[^"]+)"')
NEWEST = "topwork needs Kubernetes 1.31 or newer: kubectl version"
# A longer reason of validation repeats the whole object; its end says what is wrong with it.
LONGEST = 160


@dataclass(frozen=True)
class Place:
    """Where a request went, for messages.

    Attributes:
        server: URL of the API server.
        login: Whose login it was.
        namespace: Namespace that it was about.
        what: What was asked, such as `apply Job cats-1a2b3c4d in team-a`.
    """

    server: str
    login: str
    namespace: str
    what: str


class PassingError(UnavailableError):
    """Worth another try: overload, a broken connection, a server that starts.

    Attributes:
        retry_after: Seconds that the server asked to wait.
        ambiguous: Whether the request may have been done all the same.
    """

    retry_after: float | None = None
    ambiguous: bool = False


class QuietError(PassingError):
    """Nothing came for as long as was to be waited."""


class GoneError(PassingError):
    """The version that was asked for is forgotten: list again."""


class MissingError(SettingError):
    """The object is not there."""


class ForbiddenError(SettingError):
    """The account has no right to do this."""


class ReplacedError(SettingError):
    """The object is another one than was meant: its uid differs."""


class NotStartedError(SettingError):
    """The container has no log yet."""


def refused(code: int, body: bytes, headers: Any, place: Place) -> TopworkError:
    """Say what an answer that is no success means.

    Args:
        code: HTTP status.
        body: Body of the answer, a `Status` or whatever a proxy wrote.
        headers: Headers of the answer.
        place: Where the request went.

    Returns:
        The error to raise.
    """
    status = _status(body)
    said = status.get("message") or _plain(body) or f"HTTP {code}"
    if code in {408, 425, 429} or code >= 500:
        return _overloaded(code, said, headers, place)
    by_code = {401: _unauthorized, 403: _forbidden, 404: _missing, 409: _conflict, 410: _gone, 422: _invalid}
    if code in by_code:
        return by_code[code](status, said, place)
    if 300 <= code < 400:
        target = headers.get("Location", "elsewhere")
        return SettingError(f"{place.server} answers with a redirect to {target}: it is no API server of Kubernetes.")
    return _bad_request(said, place)


def _overloaded(code: int, said: str, headers: Any, place: Place) -> TopworkError:
    if said.startswith("failed to create typed patch object"):  # a 500 for what is no fault of the server
        return SettingError(f"The cluster does not know a field of what it was asked to {place.what}: {said}. {NEWEST}")
    if "denied the request" in said:
        return _denied(said, place)
    error = PassingError(f"{place.server} could not {place.what} ({code}: {said}). Try again later.")
    after = str(headers.get("Retry-After", ""))
    error.retry_after = float(after) if after.isdigit() else None
    error.ambiguous = code >= 500
    return error


def _unauthorized(_: dict[str, Any], said: str, place: Place) -> TopworkError:
    return SettingError(
        f"{place.server} does not accept {place.login} (401: {said}). "
        "Log in again as you do for kubectl, or choose another context with --context."
    )


def _forbidden(_: dict[str, Any], said: str, place: Place) -> TopworkError:
    why = said.partition(" is forbidden: ")[2] or said
    if found := RBAC.search(said):
        return ForbiddenError(
            f"{found['user']} may not {found['verb']} {found['resource']} in the namespace {place.namespace}. Whoever "
            "runs the cluster can give you the role topwork-submitter of k8s/base; kubectl auth can-i "
            f"{found['verb']} {found['resource']} -n {place.namespace} says when it is there."
        )
    if "quota" in why:
        return SettingError(
            f"The quota of the namespace {place.namespace} refused to {place.what}: {why}. "
            f"See what is taken with: kubectl describe quota -n {place.namespace}"
        )
    if "PodSecurity" in why:
        return SettingError(
            f"The namespace {place.namespace} refused to {place.what}: {why}. "
            f"Its level is in its labels: kubectl get namespace {place.namespace} --show-labels"
        )
    if "being terminated" in why:
        return SettingError(
            f"The namespace {place.namespace} is being deleted. Wait until it is gone and make it again, "
            "or choose another with --namespace."
        )
    if "denied" in why:
        return _denied(said, place)
    return ForbiddenError(f"The cluster refused to {place.what}: {said}.")


def _denied(said: str, place: Place) -> TopworkError:
    return SettingError(
        f"A policy of the cluster refused to {place.what}: {said.rstrip('.')}. "
        "Change the spec to what it asks for, or talk to whoever runs the cluster."
    )


def _missing(status: dict[str, Any], said: str, place: Place) -> TopworkError:
    details = status.get("details") or {}
    if details.get("kind") == "namespaces":
        name = details.get("name", place.namespace)
        return SettingError(
            f"There is no namespace {name} at {place.server}. Make it with: kubectl create namespace {name} "
            "- or choose another with --namespace."
        )
    if details.get("name"):
        return MissingError(f"{place.server} could not {place.what}: {said}.")
    return SettingError(
        f"{place.server} could not {place.what} (404: {said}): it is no API server of Kubernetes, or an old one. "
        f"{NEWEST}"
    )


def _conflict(status: dict[str, Any], said: str, place: Place) -> TopworkError:
    causes = (status.get("details") or {}).get("causes") or []
    taken = [cause for cause in causes if cause.get("reason") == "FieldManagerConflict"]
    if taken:
        fields = ", ".join(f"{cause.get('field', '?')} ({_manager(cause)})" for cause in taken)
        return SettingError(
            f"The cluster refused to {place.what}: another program has set {fields}. Leave these fields to topwork, "
            "or cancel the job and submit it again."
        )
    if "UID in" in said:
        return ReplacedError(f"{place.server} could not {place.what}: {said}.")
    error = PassingError(f"{place.server} could not {place.what} (409: {said}). Try again later.")
    error.ambiguous = True
    return error


def _manager(cause: dict[str, Any]) -> str:
    found = re.search(r'conflict with "([^"]+)"', cause.get("message", ""))
    return found[1] if found else "unknown"


def _gone(_: dict[str, Any], said: str, place: Place) -> TopworkError:
    return GoneError(f"{place.server} could not {place.what} (410: {said}). Try again.")


def _invalid(status: dict[str, Any], said: str, place: Place) -> TopworkError:
    causes = (status.get("details") or {}).get("causes") or []
    reasons = [f"{cause.get('field', '')}: {_short(cause.get('message', ''))}" for cause in causes]
    if not causes and "denied" in said:
        return _denied(said, place)
    return SettingError(f"The cluster refused to {place.what}: {'; '.join(reasons) or _short(said)}.")


def _bad_request(said: str, place: Place) -> TopworkError:
    if "is waiting to start" in said or "does not have a host assigned" in said or "ContainerCreating" in said:
        return NotStartedError(f"{place.server} could not {place.what}: {said}.")
    if "denied the request" in said:
        return _denied(said, place)
    return SettingError(f"The cluster refused to {place.what}: {_short(said)}.")


def broken(error: BaseException, place: Place) -> TopworkError:
    """Say why a request got no answer.

    Args:
        error: What the client raised.
        place: Where the request went.
    """
    why = _why(error)
    if "certificate verify failed" in why.lower():
        return SettingError(
            f"The certificate of {place.server} is not trusted ({why}). The kubeconfig names its authority in "
            "certificate-authority or certificate-authority-data: fetch the kubeconfig anew."
        )
    if any(
        word in why.lower() for word in ("pem lib", "no start line", "key values mismatch", "alert", "no certificate")
    ):
        return SettingError(
            f"{place.server} does not accept the certificate of {place.login} ({why}). "
            "Log in again as you do for kubectl."
        )
    if "wrong version number" in why.lower() or "record layer failure" in why.lower():
        return SettingError(f"{place.server} does not speak TLS ({why}). Look at server in the kubeconfig.")
    failed = PassingError(
        f"{place.server} can't be reached to {place.what} ({why}). "
        "Look at the network, a VPN and the proxy (kubectl cluster-info), or try again later."
    )
    failed.ambiguous = True
    return failed


def garbage(body: bytes, place: Place) -> TopworkError:
    """Say that an answer is not what an API server writes."""
    error = PassingError(
        f"{place.server} could not {place.what}: what it answered is not of Kubernetes ({_plain(body) or 'nothing'}). "
        "Look at server in the kubeconfig and at the proxy."
    )
    error.ambiguous = True
    return error


def _status(body: bytes) -> dict[str, Any]:
    try:
        content = json.loads(body)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _plain(body: bytes) -> str:
    text = " ".join(body.decode(errors="replace").split())
    return text if len(text) <= LONGEST else text[:LONGEST] + "…"


def _short(said: str) -> str:
    return said if len(said) <= LONGEST else "…" + said.rpartition(": ")[2][-LONGEST:]


def _why(error: BaseException) -> str:
    """The innermost reason: `[Errno 111] Connection refused` says more than three layers around it."""
    inner: BaseException = error
    while (below := inner.__cause__ or inner.__context__) is not None:
        inner = below
    if isinstance(inner, ssl.SSLError):
        return str(inner)
    if isinstance(inner, OSError) and inner.strerror:
        return inner.strerror
    return " ".join(str(inner).split()) or type(inner).__name__
