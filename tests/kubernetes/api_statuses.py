"""Error responses of an API server: `Status` objects with the messages of real servers, and injected faults."""

from dataclasses import dataclass, field
from typing import Any


class ApiError(Exception):
    """An error response: a `Status` object and headers."""

    def __init__(self, status: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        super().__init__(status["message"])
        self.status, self.headers = status, headers or {}


def status(code: int, reason: str, message: str, details: dict[str, Any] | None = None) -> dict[str, Any]:
    fields = {
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {},
        "status": "Failure",
        "message": message,
        "reason": reason,
        "details": details or {},
        "code": code,
    }
    return {key: value for key, value in fields.items() if value not in ("", {}) or key == "metadata"}


def unauthorized() -> dict[str, Any]:
    return status(401, "Unauthorized", "Unauthorized")


def not_found(plural: str, name: str) -> dict[str, Any]:
    """Report a missing object; `plural` includes the group, such as jobs.batch."""
    return status(404, "NotFound", f'{plural} "{name}" not found', {"name": name, "kind": plural.partition(".")[0]})


def namespace_not_found(name: str) -> dict[str, Any]:
    return not_found("namespaces", name)


def unknown_api() -> dict[str, Any]:
    return status(404, "NotFound", "the server could not find the requested resource")


def forbidden(plural: str, name: str, reason: str) -> dict[str, Any]:
    """Report a request denied by an admission plugin, with its message as `reason`."""
    details = {"name": name, "kind": plural.partition(".")[0]}
    return status(403, "Forbidden", f'{plural} "{name}" is forbidden: {reason}', details)


def rbac_denied(
    verb: str, plural: str, namespace: str, name: str = "", group: str = "", user: str = "alice"
) -> dict[str, Any]:
    full = f"{plural.partition('/')[0]}.{group}" if group else plural.partition("/")[0]
    target = f'{full} "{name}"' if name else full
    scope = f'in the namespace "{namespace}"' if namespace else "at the cluster scope"
    message = f'{target} is forbidden: User "{user}" cannot {verb} resource "{plural}" in API group "{group}" {scope}'
    return status(403, "Forbidden", message, {"name": name, "kind": plural.partition("/")[0]})


def quota_exceeded(
    plural: str, name: str, requested: str, used: str, limited: str, quota: str = "compute"
) -> dict[str, Any]:
    reason = f"exceeded quota: {quota}, requested: {requested}, used: {used}, limited: {limited}"
    return forbidden(plural, name, reason)


def pod_security_violation(name: str, reason: str, level: str = "restricted:latest") -> dict[str, Any]:
    return forbidden("pods", name, f'violates PodSecurity "{level}": {reason}')


def webhook_denied(name: str, message: str, code: int = 400) -> dict[str, Any]:
    reason = {400: "BadRequest", 403: "Forbidden"}.get(code, "")
    return status(code, reason, f'admission webhook "{name}" denied the request: {message}')


def field_conflict(manager: str, version: str, *fields: str, subresource: str = "") -> dict[str, Any]:
    """Report a server-side apply of `fields` that another manager owns, through a subresource if it is set."""
    owner = f'"{manager}"' + (f' with subresource "{subresource}"' if subresource else "") + f" using {version}"
    conflicts = f"conflicts with {owner}:\n" + "\n".join(f"- {name}" for name in fields)
    message = f"Apply failed with {len(fields)} conflicts: {conflicts}"
    if len(fields) == 1:
        message = f"Apply failed with 1 conflict: conflict with {owner}: {fields[0]}"
    causes = [{"reason": "FieldManagerConflict", "message": f"conflict with {owner}", "field": name} for name in fields]
    return status(409, "Conflict", message, {"causes": causes})


def uid_conflict(plural: str, name: str, expected: str, actual: str) -> dict[str, Any]:
    message = (
        f'Operation cannot be fulfilled on {plural} "{name}": the UID in the precondition ({expected}) does not match '
        f"the UID in record ({actual}). The object might have been deleted and then recreated"
    )
    return status(409, "Conflict", message, {"name": name, "kind": plural.partition(".")[0]})


def uid_precondition(full: str, path: str, name: str, expected: str, actual: str) -> dict[str, Any]:
    """Report an update of an object that has another UID."""
    message = (
        f'Operation cannot be fulfilled on {full} "{name}": StorageError: invalid object, Code: 4, Key: {path}, '
        f"ResourceVersion: 0, AdditionalErrorMsg: Precondition failed: UID in precondition: {expected}, "
        f"UID in object meta: {actual}"
    )
    return status(409, "Conflict", message, _details(full, name))


def modified(full: str, name: str) -> dict[str, Any]:
    """Report an update whose resourceVersion is not the current one."""
    reason = "the object has been modified; please apply your changes to the latest version and try again"
    return status(409, "Conflict", f'Operation cannot be fulfilled on {full} "{name}": {reason}', _details(full, name))


def already_exists(full: str, name: str) -> dict[str, Any]:
    return status(409, "AlreadyExists", f'{full} "{name}" already exists', _details(full, name))


def unsupported_media_type(*accepted: str) -> dict[str, Any]:
    message = "the body of the request was in an unknown format - accepted media types include: " + ", ".join(accepted)
    return status(415, "UnsupportedMediaType", message)


def _details(full: str, name: str) -> dict[str, Any]:
    plural, _, group = full.partition(".")
    return {"name": name, "kind": plural} | ({"group": group} if group else {})


def invalid(
    kind: str, name: str, field_path: str, message: str, group: str = "", reason: str = "FieldValueInvalid"
) -> dict[str, Any]:
    """Report a field that failed validation, such as `Invalid value: 0: must be greater than or equal to 1`."""
    full = f"{kind}.{group}" if group else kind
    causes = [{"reason": reason, "message": message, "field": field_path}]
    details = {"name": name, "group": group, "kind": kind, "causes": causes}
    return status(422, "Invalid", f'{full} "{name}" is invalid: {field_path}: {message}', details)


def bad_request(message: str) -> dict[str, Any]:
    return status(400, "BadRequest", message)


def container_waiting(container: str, pod: str, reason: str = "PodInitializing") -> dict[str, Any]:
    return bad_request(f'container "{container}" in pod "{pod}" is waiting to start: {reason}')


def expired(message: str = "too old resource version: 1 (1000)") -> dict[str, Any]:
    return status(410, "Expired", message)


def too_many_requests(seconds: int = 1) -> dict[str, Any]:
    message = "The server has received too many requests and has asked us to try again later"
    return status(429, "TooManyRequests", message, {"retryAfterSeconds": seconds})


def internal_error(reason: str = "etcdserver: leader changed") -> dict[str, Any]:
    causes = {"causes": [{"message": reason}]}
    return status(500, "InternalError", f"Internal error occurred: {reason}", causes)


def service_unavailable() -> dict[str, Any]:
    return status(503, "ServiceUnavailable", "the server is currently unable to handle the request")


@dataclass
class Fault:
    """A fault of one request, for `ApiServer.inject`.

    Attributes:
        status: `Status` object to respond with.
        body: Body to respond with, with code 200 or the code of `status`.
        headers: Headers of that response.
        delay_seconds: Delay before the response.
        cut_after_bytes: Bytes of the response body after which the connection is closed.
        stall_after_bytes: Bytes of the response body after which the connection stays open and silent.
        reset: Whether the connection is reset before the response.
        method: Only requests with this method.
        path: Only requests whose path (without query) contains this.
    """

    status: dict[str, Any] | None = None
    body: bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)
    delay_seconds: float = 0.0
    cut_after_bytes: int | None = None
    stall_after_bytes: int | None = None
    reset: bool = False
    method: str = ""
    path: str = ""

    def matches(self, method: str, path: str) -> bool:
        return self.method in {"", method} and self.path in path
