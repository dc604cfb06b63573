"""Validating webhooks of the API server used in tests."""

import base64
import json
import ssl
import urllib.request
import uuid
from typing import Any

import api_statuses
from api_kinds import Object
from api_objects import Objects
from api_paths import Target
from api_statuses import ApiError


class Admission:
    """Calls the webhooks of all ValidatingWebhookConfigurations.

    Attributes:
        service_urls: Base URLs of the services that webhooks name, by namespace and name.
    """

    def __init__(self, objects: Objects) -> None:
        self.service_urls: dict[tuple[str, str], str] = {}
        self._objects = objects

    def webhooks(self, target: Target, operation: str) -> list[Object]:
        """Return the webhooks for an operation on an object."""
        configurations = self._objects.list_objects("ValidatingWebhookConfiguration")
        webhooks = [webhook for configuration in configurations for webhook in configuration.get("webhooks", ())]
        return [
            webhook
            for webhook in webhooks
            if any(_matches(rule, target, operation) for rule in webhook.get("rules", ()))
        ]

    def review(self, webhooks: list[Object], target: Target, request: Object) -> list[str]:
        """Let webhooks review a request, and return their warnings; raise an `ApiError` if one denies it."""
        warnings: list[str] = []
        for webhook in webhooks:
            kind = target.kind
            review_request = {
                "uid": str(uuid.uuid4()),
                "kind": {"group": kind.group, "version": kind.version, "kind": kind.name},
                "resource": {"group": kind.group, "version": kind.version, "resource": kind.plural},
                "name": target.name,
                "namespace": target.namespace,
                "userInfo": {"username": "alice"},
            }
            review = {"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview"}
            try:
                response = self._call(webhook, review | {"request": review_request | request})["response"]
            except (OSError, ValueError, KeyError) as error:
                if webhook.get("failurePolicy", "Fail") == "Ignore":
                    continue
                name = webhook["name"]
                message = f'failed calling webhook "{name}": failed to call webhook: {error}'
                raise ApiError(api_statuses.internal_error(message)) from None
            warnings += response.get("warnings", [])
            if not response["allowed"]:
                status = response.get("status", {})
                message = status.get("message", "") or "without explanation"
                raise ApiError(api_statuses.webhook_denied(webhook["name"], message, max(400, status.get("code", 400))))
        return warnings

    def _call(self, webhook: Object, review: Object) -> Any:
        configuration = webhook["clientConfig"]
        url = configuration.get("url", "")
        if service := configuration.get("service"):
            base = self.service_urls.get((service["namespace"], service["name"]))
            if base is None:
                raise OSError(f'service "{service["name"]}" not found')
            url = base + service.get("path", "")
        context = None
        if url.startswith("https:"):
            authorities = base64.b64decode(configuration.get("caBundle", "")).decode()
            context = ssl.create_default_context(cadata=authorities or None)
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        request = urllib.request.Request(url, json.dumps(review).encode(), headers)
        with urllib.request.urlopen(request, timeout=webhook.get("timeoutSeconds", 10), context=context) as response:
            return json.load(response)


def _matches(rule: Object, target: Target, operation: str) -> bool:
    resource = target.kind.plural + (f"/{target.subresource}" if target.subresource else "")
    return (
        {operation, "*"} & {*rule["operations"]} != set()
        and {target.kind.group, "*"} & {*rule["apiGroups"]} != set()
        and {target.kind.version, "*"} & {*rule["apiVersions"]} != set()
        and {resource, "*/*" if target.subresource else "*"} & {*rule["resources"]} != set()
    )
