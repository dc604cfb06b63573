"""Errors of the Kubernetes API: HTTP statuses and connection failures as one-line messages that name the fix.

TransientError              worth a retry: overload, a broken connection, a conflict
├── IdleTimeoutError        a stream sent nothing within its read timeout
└── ResourceExpiredError    410: the server no longer has this resourceVersion
SettingError                not worth a retry
├── NotFoundError           the object does not exist
├── ForbiddenError          RBAC denies the request
├── UidConflictError        the object was deleted and created again
├── NamespaceTerminatingError    the namespace is being deleted
└── ContainerNotStartedError    the container has no log yet
"""

import json
import re
import ssl
from dataclasses import dataclass
from typing import Any

from topwork.errors import SettingError, TopworkError, UnavailableError

RBAC_DENIAL = re.compile(r'User "(?P<user>[^"]*)" cannot (?P<verb>\S+) resource "(?P<resource>[^"]+)"')
MINIMUM_VERSION = "topwork needs Kubernetes 1.31 or newer; check the version with: kubectl version"
LOG_IN = "Log in again as you do for kubectl."
# Longer validation messages repeat the complete object; the actual error is at the end.
MAX_MESSAGE_LENGTH = 160
CLIENT_CERTIFICATE_ERRORS = ("pem lib", "no start line", "key values mismatch", "alert", "no certificate")
NO_TLS_ERRORS = ("wrong version number", "record layer failure")
CONTAINER_NOT_STARTED = ("is waiting to start", "does not have a host assigned", "ContainerCreating")


@dataclass(frozen=True)
class RequestContext:
    """Describes a request in error messages.

    Attributes:
        server: URL of the API server.
        identity: Source of the credentials, such as `context staging`.
        namespace: Namespace of the request.
        action: The action, such as `apply Job cats-1a2b3c4d in team-a`.
    """

    server: str
    identity: str
    namespace: str
    action: str


class TransientError(UnavailableError):
    """A failure that a retry may fix: overload, a broken connection, a server that is starting.

    Attributes:
        retry_after: Delay in seconds from the Retry-After header; None if the server sent none.
        ambiguous: Whether the server may have processed the request despite the failure.
    """

    retry_after: float | None = None
    ambiguous: bool = False


class IdleTimeoutError(TransientError):
    """A stream sent no data within its read timeout."""


class ResourceExpiredError(TransientError):
    """The server no longer has the requested resourceVersion (410 Gone); list the objects again."""


class NotFoundError(SettingError):
    """The object does not exist."""


class UnknownApiError(SettingError):
    """The server does not serve the kind: its CustomResourceDefinition is missing, or it is not Kubernetes."""


class ForbiddenError(SettingError):
    """RBAC denies the request."""


class UidConflictError(SettingError):
    """The object has a different UID than expected: it was deleted and created again."""


class NamespaceTerminatingError(SettingError):
    """The namespace is being deleted, so nothing can be created in it."""


class ConflictError(SettingError):
    """The object to create exists, or the object to replace was changed in the meantime."""


class ContainerNotStartedError(SettingError):
    """The container has not started, so it has no log yet."""


# ── HTTP statuses ───────────────────────────────────────────────────────────────────────────────────────────────────


def response_error(code: int, body: bytes, headers: Any, context: RequestContext) -> TopworkError:
    """Convert an unsuccessful response to an error.

    Args:
        code: HTTP status code.
        body: Response body: a `Status` object, or arbitrary text from a proxy.
        headers: Response headers.
        context: Describes the request.

    Returns:
        The error to raise.
    """
    status = _parse_status(body)
    message = status.get("message") or _one_line(body) or f"HTTP {code}"
    if code in {408, 425, 429} or code >= 500:
        return _server_error(code, message, headers, context)
    by_code = {
        401: _unauthorized,
        403: _forbidden,
        404: _not_found,
        409: _conflict,
        410: _expired,
        422: _invalid,
    }
    if code in by_code:
        return by_code[code](status, message, context)
    if 300 <= code < 400:
        target = headers.get("Location", "another URL")
        return SettingError(
            f"{context.server} redirects to {target}, so it is not a Kubernetes API server. "
            "Check server in the kubeconfig."
        )
    return _bad_request(message, context)


def _rejected(context: RequestContext, message: str) -> str:
    return f"The cluster rejected the request to {context.action}: {message}."


def _server_error(code: int, message: str, headers: Any, context: RequestContext) -> TopworkError:
    if message.startswith("failed to create typed patch object"):  # sent with status 500, but a retry never helps
        return SettingError(
            f"The cluster could not {context.action}, because it does not know a field of the object: {message}. "
            f"{MINIMUM_VERSION}"
        )
    if "denied the request" in message:
        return _policy_denied(message, context)
    error = TransientError(f"{context.server} could not {context.action} ({code}: {message}). Try again later.")
    retry_after = str(headers.get("Retry-After", ""))
    error.retry_after = float(retry_after) if retry_after.isdigit() else None
    error.ambiguous = code >= 500
    return error


def _unauthorized(_: dict[str, Any], message: str, context: RequestContext) -> TopworkError:
    return SettingError(
        f"{context.server} rejected the credentials of {context.identity} (401: {message}). "
        "Log in again as you do for kubectl, or choose another context with --context."
    )


def _forbidden(_: dict[str, Any], message: str, context: RequestContext) -> TopworkError:
    reason = message.partition(" is forbidden: ")[2] or message
    namespace = context.namespace
    if denial := RBAC_DENIAL.search(message):
        is_controller = denial["user"].endswith("-controller")
        role = "topwork-controller of k8s/controller" if is_controller else "topwork-submitter of k8s/base"
        return ForbiddenError(
            f"{denial['user']} is not allowed to {denial['verb']} {denial['resource']} in namespace {namespace}. "
            f"Ask a cluster administrator for the role {role}, then check with: "
            f"kubectl auth can-i {denial['verb']} {denial['resource']} -n {namespace}"
            f"{' --as ' + denial['user'] if is_controller else ''}"
        )
    if "quota" in reason:
        return SettingError(
            f"A resource quota of namespace {namespace} rejected the request to {context.action}: {reason}. "
            f"See current usage with: kubectl describe quota -n {namespace}"
        )
    if "PodSecurity" in reason:
        return SettingError(
            f"Pod Security admission of namespace {namespace} rejected the request to {context.action}: {reason}. "
            f"See the enforced level with: kubectl get namespace {namespace} --show-labels"
        )
    if "being terminated" in reason:
        return NamespaceTerminatingError(
            f"Namespace {namespace} is being deleted. Wait until it is gone and create it again, "
            "or choose another namespace with --namespace."
        )
    if "denied" in reason:
        return _policy_denied(message, context)
    return ForbiddenError(_rejected(context, message))


def _policy_denied(message: str, context: RequestContext) -> TopworkError:
    return SettingError(
        f"An admission policy of the cluster rejected the request to {context.action}: {message.rstrip('.')}. "
        "Change the job spec to satisfy the policy, or ask a cluster administrator."
    )


def _not_found(status: dict[str, Any], message: str, context: RequestContext) -> TopworkError:
    details = status.get("details") or {}
    if details.get("kind") == "namespaces":
        name = details.get("name", context.namespace)
        return SettingError(
            f"Namespace {name} does not exist at {context.server}. Create it with: kubectl create namespace {name} "
            "- or choose another namespace with --namespace."
        )
    if details.get("name"):
        return NotFoundError(f"{context.server} could not {context.action}: {message}.")
    return UnknownApiError(
        f"{context.server} could not {context.action} (404: {message}): it is not a Kubernetes API server, or too old. "
        f"{MINIMUM_VERSION}"
    )


def _conflict(status: dict[str, Any], message: str, context: RequestContext) -> TopworkError:
    if status.get("reason") == "AlreadyExists" or context.action.startswith("update "):
        return ConflictError(f"{context.server} could not {context.action}: {message}.")
    causes = (status.get("details") or {}).get("causes") or []
    conflicts = [cause for cause in causes if cause.get("reason") == "FieldManagerConflict"]
    if conflicts:
        fields = ", ".join(f"{cause.get('field', '?')} (owned by {_field_manager(cause)})" for cause in conflicts)
        return SettingError(
            f"The cluster rejected the request to {context.action}, because another field manager set {fields}. "
            "Leave these fields to topwork, or cancel the job and submit it again."
        )
    if "UID in" in message or "uid mismatch" in message:
        return UidConflictError(f"{context.server} could not {context.action}: {message}.")
    error = TransientError(f"{context.server} could not {context.action} (409: {message}). Try again later.")
    error.ambiguous = True
    return error


def _field_manager(cause: dict[str, Any]) -> str:
    match = re.search(r'conflict with "([^"]+)"', cause.get("message", ""))
    return match[1] if match else "unknown"


def _expired(_: dict[str, Any], message: str, context: RequestContext) -> TopworkError:
    return ResourceExpiredError(f"{context.server} could not {context.action} (410: {message}). Try again.")


def _invalid(status: dict[str, Any], message: str, context: RequestContext) -> TopworkError:
    causes = (status.get("details") or {}).get("causes") or []
    if not causes and "denied" in message:
        return _policy_denied(message, context)
    if any(cause.get("field") == "metadata.uid" for cause in causes):
        return UidConflictError(f"{context.server} could not {context.action}: {message}.")
    reasons = [f"{cause.get('field', '')}: {_shorten(cause.get('message', ''))}" for cause in causes]
    return SettingError(_rejected(context, "; ".join(reasons) or _shorten(message)))


def _bad_request(message: str, context: RequestContext) -> TopworkError:
    if any(text in message for text in CONTAINER_NOT_STARTED):
        return ContainerNotStartedError(f"{context.server} could not {context.action}: {message}.")
    if "denied the request" in message:
        return _policy_denied(message, context)
    return SettingError(_rejected(context, _shorten(message)))


# ── Connection failures ─────────────────────────────────────────────────────────────────────────────────────────────


def connection_error(error: BaseException, context: RequestContext) -> TopworkError:
    """Convert a failure to connect, or a connection that broke, to an error.

    Args:
        error: The exception from the client library.
        context: Describes the request.

    Returns:
        The error to raise: a SettingError for TLS failures, otherwise a TransientError.
    """
    reason = _root_cause(error)
    lower = reason.lower()
    if "certificate verify failed" in lower:
        return SettingError(
            f"The TLS certificate of {context.server} is not trusted ({reason}). The kubeconfig sets the trusted "
            "authority in certificate-authority or certificate-authority-data: download the kubeconfig again."
        )
    if any(text in lower for text in CLIENT_CERTIFICATE_ERRORS):
        return SettingError(
            f"{context.server} rejected the client certificate of {context.identity} ({reason}). {LOG_IN}"
        )
    if any(text in lower for text in NO_TLS_ERRORS):
        return SettingError(f"{context.server} does not use TLS ({reason}). Check server in the kubeconfig.")
    transient = TransientError(
        f"{context.server} is unreachable: could not {context.action} ({reason}). "
        "Check the network, the VPN and the proxy (kubectl cluster-info), or try again later."
    )
    transient.ambiguous = True
    return transient


def unexpected_response_error(body: bytes, context: RequestContext) -> TopworkError:
    """Create the error for a response body that is not from a Kubernetes API server."""
    error = TransientError(
        f"{context.server} could not {context.action}: the response is not from a Kubernetes API server "
        f"({_one_line(body) or 'empty'}). Check server in the kubeconfig and the proxy."
    )
    error.ambiguous = True
    return error


def _parse_status(body: bytes) -> dict[str, Any]:
    try:
        content = json.loads(body)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _one_line(body: bytes) -> str:
    text = " ".join(body.decode(errors="replace").split())
    return text if len(text) <= MAX_MESSAGE_LENGTH else text[:MAX_MESSAGE_LENGTH] + "…"


def _shorten(message: str) -> str:
    return message if len(message) <= MAX_MESSAGE_LENGTH else "…" + message.rpartition(": ")[2][-MAX_MESSAGE_LENGTH:]


def _root_cause(error: BaseException) -> str:
    """Describe the innermost exception: `Connection refused` is clearer than the urllib3 errors around it."""
    cause: BaseException = error
    while (inner := cause.__cause__ or cause.__context__) is not None:
        cause = inner
    if isinstance(cause, ssl.SSLError):
        return str(cause)
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror
    return " ".join(str(cause).split()) or type(cause).__name__
