"""What the API server of Kubernetes answers when it refuses: `Status` objects in the wording of real servers."""

from dataclasses import dataclass, field
from typing import Any


class Refused(Exception):
    """An answer that is a failure: its `Status` and its headers."""

    def __init__(self, status: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        super().__init__(status["message"])
        self.status, self.headers = status, headers or {}


def status(code: int, reason: str, message: str, details: dict[str, Any] | None = None) -> dict[str, Any]:
    found = {
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {},
        "status": "Failure",
        "message": message,
        "reason": reason,
        "details": details or {},
        "code": code,
    }
    return {key: value for key, value in found.items() if value not in ("", {}) or key == "metadata"}


def unauthorized() -> dict[str, Any]:
    return status(401, "Unauthorized", "Unauthorized")


def not_found(plural: str, name: str) -> dict[str, Any]:
    """`plural` with its group, such as jobs.batch."""
    return status(404, "NotFound", f'{plural} "{name}" not found', {"name": name, "kind": plural.partition(".")[0]})


def no_namespace(name: str) -> dict[str, Any]:
    return not_found("namespaces", name)


def no_such_api() -> dict[str, Any]:
    return status(404, "NotFound", "the server could not find the requested resource")


def forbidden(plural: str, name: str, why: str) -> dict[str, Any]:
    """`why` as an admission plugin words it."""
    details = {"name": name, "kind": plural.partition(".")[0]}
    return status(403, "Forbidden", f'{plural} "{name}" is forbidden: {why}', details)


def rbac(
    verb: str, plural: str, namespace: str, name: str = "", group: str = "", user: str = "alice"
) -> dict[str, Any]:
    full = f"{plural.partition('/')[0]}.{group}" if group else plural.partition("/")[0]
    what = f'{full} "{name}"' if name else full
    message = (
        f'{what} is forbidden: User "{user}" cannot {verb} resource "{plural}" in API group "{group}" '
        f'in the namespace "{namespace}"'
    )
    return status(403, "Forbidden", message, {"name": name, "kind": plural.partition("/")[0]})


def quota(plural: str, name: str, requested: str, used: str, limited: str, quota: str = "compute") -> dict[str, Any]:
    why = f"exceeded quota: {quota}, requested: {requested}, used: {used}, limited: {limited}"
    return forbidden(plural, name, why)


def pod_security(name: str, why: str, level: str = "restricted:latest") -> dict[str, Any]:
    return forbidden("pods", name, f'violates PodSecurity "{level}": {why}')


def webhook(name: str, why: str, code: int = 400) -> dict[str, Any]:
    reason = {400: "BadRequest", 403: "Forbidden"}.get(code, "")
    return status(code, reason, f'admission webhook "{name}" denied the request: {why}')


def field_conflict(manager: str, version: str, *fields: str) -> dict[str, Any]:
    """What server-side apply says when `fields` belong to another manager."""
    many, whose = len(fields) > 1, f'"{manager}" using {version}'
    what = f"conflicts with {whose}:\n" + "\n".join(f"- {each}" for each in fields)
    message = f"Apply failed with {len(fields)} conflicts: {what}"
    if not many:
        message = f"Apply failed with 1 conflict: conflict with {whose}: {fields[0]}"
    causes = [{"reason": "FieldManagerConflict", "message": f"conflict with {whose}", "field": each} for each in fields]
    return status(409, "Conflict", message, {"causes": causes})


def uid_conflict(plural: str, name: str, wanted: str, found: str) -> dict[str, Any]:
    message = (
        f'Operation cannot be fulfilled on {plural} "{name}": the UID in the precondition ({wanted}) does not match '
        f"the UID in record ({found}). The object might have been deleted and then recreated"
    )
    return status(409, "Conflict", message, {"name": name, "kind": plural.partition(".")[0]})


def invalid(
    kind: str, name: str, field_path: str, why: str, group: str = "", reason: str = "FieldValueInvalid"
) -> dict[str, Any]:
    """`why` as validation words it, such as `Invalid value: 0: must be greater than or equal to 1`."""
    full = f"{kind}.{group}" if group else kind
    causes = [{"reason": reason, "message": why, "field": field_path}]
    details = {"name": name, "group": group, "kind": kind, "causes": causes}
    return status(422, "Invalid", f'{full} "{name}" is invalid: {field_path}: {why}', details)


def bad_request(message: str) -> dict[str, Any]:
    return status(400, "BadRequest", message)


def waiting(container: str, pod: str, reason: str = "PodInitializing") -> dict[str, Any]:
    return bad_request(f'container "{container}" in pod "{pod}" is waiting to start: {reason}')


def expired(message: str = "too old resource version: 1 (1000)") -> dict[str, Any]:
    return status(410, "Expired", message)


def too_many(seconds: int = 1) -> dict[str, Any]:
    message = "The server has received too many requests and has asked us to try again later"
    return status(429, "TooManyRequests", message, {"retryAfterSeconds": seconds})


def internal(why: str = "etcdserver: leader changed") -> dict[str, Any]:
    causes = {"causes": [{"message": why}]}
    return status(500, "InternalError", f"Internal error occurred: {why}", causes)


def unavailable() -> dict[str, Any]:
    return status(503, "ServiceUnavailable", "the server is currently unable to handle the request")


@dataclass
class Fault:
    """Something that goes wrong with one request. Plant it with `ApiServer.plant`.

    Attributes:
        answer: A `Status` that is answered instead, with its code.
        body: Bytes that are answered instead, with code 200 (or the code of `answer`).
        headers: Headers of that answer.
        delay: Seconds to wait before anything is answered.
        cut_after: Bytes of the answer's body after which the connection breaks off.
        stall_after: Bytes of the answer's body after which nothing more comes, over an open connection.
        reset: The connection is reset before anything is answered.
        method: Only requests of this method.
        path: Only requests whose path (without query) contains this.
    """

    answer: dict[str, Any] | None = None
    body: bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    cut_after: int | None = None
    stall_after: int | None = None
    reset: bool = False
    method: str = ""
    path: str = ""

    def meets(self, method: str, path: str) -> bool:
        return self.method in {"", method} and self.path in path
