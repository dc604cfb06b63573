"""Client of a Kubernetes cluster: applies, reads, lists, watches and deletes objects, and reads logs.

Objects are plain dictionaries with the keys of their YAML form. Rejected requests raise `SettingError`; transient
errors are retried and raise `UnavailableError` if all attempts fail. See `topwork.clients.kubernetes.errors`.

Example:
    >>> cluster = connect(ClusterSettings(namespace="team-a"))
    >>> cluster.apply({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "settings"}, "data": {"a": "1"}})
    >>> for type, pod in cluster.watch("Pod", labels="app=trainer", seconds=60):
    ...     print(type, pod["metadata"]["name"], pod["status"]["phase"])
"""

from collections.abc import Iterator
from itertools import islice

from topwork.clients.kubernetes import KubernetesObject
from topwork.clients.kubernetes.api_request import KINDS, ApiRequest
from topwork.clients.kubernetes.connection import ClusterSettings, HttpAccess
from topwork.clients.kubernetes.errors import NotFoundError, TransientError, UidConflictError, UnknownApiError
from topwork.clients.kubernetes.logs import LogReader
from topwork.clients.kubernetes.rest_client import RestClient
from topwork.clients.kubernetes.watch import Watcher, WatchEvent

__all__ = ["Cluster", "ClusterSettings", "KubernetesObject", "WatchEvent", "connect"]

FIELD_MANAGER = "topwork"
# A pod serves its metrics within milliseconds; if it takes much longer, it is not responding.
PROXY_TIMEOUT_SECONDS = 5.0
# A metrics page has a few hundred lines; the limit guards against a pod that never ends its response.
MAX_PROXY_LINES = 100_000
DEFAULT_SETTINGS = ClusterSettings()


def connect(settings: ClusterSettings = DEFAULT_SETTINGS) -> "Cluster":
    """Connect to a cluster as kubectl would; sends no request yet.

    Example:
        >>> connect(ClusterSettings(context="staging")).list("Job", labels="topwork.dev/job=cats")

    Args:
        settings: Selects the cluster, and sets timeouts and retries.

    Raises:
        SettingError: If there is no configuration or no such context, or the configuration can't be used.
    """
    return Cluster(RestClient(settings))


class Cluster:
    """A cluster, with a default namespace.

    Args:
        client: Client of its API server.
        namespace: Default namespace; None for that of the connection.
    """

    def __init__(self, client: RestClient, namespace: str | None = None) -> None:
        self._client = client
        self._namespace = namespace

    @property
    def namespace(self) -> str:
        """Namespace of all requests, unless an object names another."""
        return self._namespace or self._client.connection.namespace

    def in_namespace(self, namespace: str) -> "Cluster":
        """Return the same cluster with another default namespace; both share the connection."""
        return Cluster(self._client, namespace)

    @property
    def server(self) -> str:
        """URL of the API server."""
        return self._client.connection.server

    @property
    def headers(self) -> dict[str, str]:
        """Headers for requests of another HTTP client, with the current token. Never print them."""
        return self._client.connection.headers

    def open_access(self) -> HttpAccess:
        """Return what another HTTP client needs to send requests, besides `headers`.

        Raises:
            SettingError: If a certificate can't be loaded.
        """
        return self._client.connection.open_access()

    @property
    def warnings(self) -> list[str]:
        """Warnings from the server so far, such as a Pod Security level that the pods of a Job would violate."""
        return self._client.warnings

    def serves(self, kind: str) -> bool:
        """Return whether the cluster serves a kind, such as TransferJob, whose CustomResourceDefinition is optional.

        Raises:
            SettingError: If the server rejects the request.
            UnavailableError: If the server is unreachable or overloaded.
        """
        try:
            resources = self._client.send(ApiRequest("read", KINDS[kind], "", discovery=True))["resources"]
        except UnknownApiError:
            return False
        return any(resource["kind"] == kind for resource in resources)

    def apply(
        self,
        obj: KubernetesObject,
        *,
        dry_run: bool = False,
        manager: str = FIELD_MANAGER,
        force: bool = False,
        subresource: str = "",
    ) -> KubernetesObject:
        """Create or update an object with server-side apply.

        Args:
            obj: The object; without a namespace, it is created in the default one. With a resourceVersion, the
                request fails with `ConflictError` if that is not the current one; with a UID, it fails with
                `UidConflictError` if the object was deleted and created again. The API server ignores the UID in
                requests to the status of a custom resource.
            dry_run: Let the server validate the object without storing it.
            manager: Field manager.
            force: Take fields that other field managers own, instead of failing with a conflict.
            subresource: Apply to this subresource, such as `status`, of an existing object.

        Returns:
            The object as stored by the server.

        Raises:
            SettingError: If the server rejects the object.
            UnavailableError: If the server is unreachable or overloaded.
        """
        kind = KINDS[obj["kind"]]
        metadata = dict(obj["metadata"])
        if kind.namespaced:
            metadata.setdefault("namespace", self.namespace)
        query = {
            "fieldManager": manager,
            "fieldValidation": "Strict",
            "dryRun": "All" if dry_run else None,
            "force": "true" if force else None,
        }
        namespace, name = metadata.get("namespace", ""), metadata["name"]
        body = obj | {"metadata": metadata}
        verb = "update" if "resourceVersion" in metadata else "apply"
        request = ApiRequest(verb, kind, namespace, name, "PATCH", subresource, query, body)
        return self._client.send(request)

    def create(self, obj: KubernetesObject) -> KubernetesObject:
        """Create an object; fails with `ConflictError` if it exists."""
        return self._write("create", obj, "POST")

    def replace(self, obj: KubernetesObject) -> KubernetesObject:
        """Replace an object; fails with `ConflictError` if its resourceVersion is not the current one."""
        return self._write("update", obj, "PUT")

    def _write(self, verb: str, obj: KubernetesObject, method: str) -> KubernetesObject:
        kind = KINDS[obj["kind"]]
        metadata = dict(obj["metadata"])
        if kind.namespaced:
            metadata.setdefault("namespace", self.namespace)
        name = "" if method == "POST" else metadata["name"]
        body = obj | {"metadata": metadata}
        request = ApiRequest(verb, kind, metadata.get("namespace", ""), name, method, body=body)
        return self._client.send(request)

    def get(self, kind: str, name: str) -> KubernetesObject | None:
        """Return an object, or None if it does not exist."""
        try:
            return self._client.send(ApiRequest("read", KINDS[kind], self._namespace_of(kind), name))
        except NotFoundError:
            return None

    def list(
        self, kind: str, *, labels: str = "", fields: str = "", all_namespaces: bool = False
    ) -> list[KubernetesObject]:
        """List objects.

        Args:
            kind: Kind, such as Pod.
            labels: Label selector, such as `topwork.dev/job=cats`.
            fields: Field selector, such as `status.phase=Failed`.
            all_namespaces: List the objects of all namespaces.
        """
        return self._client.list_all(self._list_request(kind, labels, fields, all_namespaces))[0]

    def watch(
        self, kind: str, *, labels: str = "", fields: str = "", all_namespaces: bool = False, seconds: float
    ) -> Iterator[WatchEvent]:
        """Watch objects: existing objects are yielded first, as ADDED, and then changes.

        A broken stream is resumed. Objects may then be yielded twice, but their latest state is never missed, and an
        object that was deleted in the meantime is yielded as DELETED.

        Args:
            kind: Kind, such as Pod.
            labels: Label selector.
            fields: Field selector.
            all_namespaces: Watch the objects of all namespaces.
            seconds: Duration of the watch.

        Yields:
            Changes.

        Raises:
            SettingError: If the server rejects the request.
            UnavailableError: If several attempts in a row to reach the server failed.
        """
        return self.watcher(kind, labels=labels, fields=fields, all_namespaces=all_namespaces).events(seconds)

    def watcher(self, kind: str, *, labels: str = "", fields: str = "", all_namespaces: bool = False) -> Watcher:
        """Return the state of a watch, which `watch` begins anew: a watcher can continue after an error.

        Args:
            kind: Kind, such as Pod.
            labels: Label selector.
            fields: Field selector.
            all_namespaces: Watch the objects of all namespaces.
        """
        return Watcher(self._client, self._list_request(kind, labels, fields, all_namespaces))

    def logs(
        self,
        pod: str,
        container: str,
        *,
        follow: bool = False,
        since: str | None = None,
        tail: int | None = None,
        timestamps: bool = False,
    ) -> Iterator[str]:
        """Read the log of a container line by line; yields nothing if it has not started or its pod does not exist.

        Args:
            pod: Name of the pod.
            container: Name of the container.
            follow: Continue until the container ends; an interrupted stream is resumed at the same line.
            since: Only lines from this time on (RFC 3339, whole seconds).
            tail: Only this many of the last lines.
            timestamps: Start each line with its timestamp.

        Yields:
            Lines without their newline.
        """
        request = ApiRequest("read", KINDS["Pod"], self.namespace, pod, subresource="log")
        reader = LogReader(self._client, request, container)
        return reader.read(follow=follow, since=since, tail=tail, timestamps=timestamps)

    def proxy_get(self, pod: str, port: int, path: str) -> str:
        """Read a page that a pod serves over HTTP, through the API server; without retries.

        Args:
            pod: Name of the pod.
            port: Port of the pod.
            path: Path without its leading slash, such as `metrics`.

        Returns:
            The text of the page.

        Raises:
            SettingError: If the server rejects the request, or the pod does not exist.
            UnavailableError: If the server or the pod does not respond.
        """
        request = ApiRequest("read", KINDS["Pod"], self.namespace, f"{pod}:{port}", subresource=f"proxy/{path}")
        with self._client.stream(request, PROXY_TIMEOUT_SECONDS) as lines:
            return "\n".join(islice(lines, MAX_PROXY_LINES)) + "\n"

    def delete(
        self,
        kind: str,
        name: str,
        *,
        uid: str | None = None,
        propagation: str = "Background",
        grace_seconds: int | None = None,
    ) -> bool:
        """Request the deletion of an object. It may exist for a while, until its pods stop or its dependents are gone.

        Args:
            kind: Kind, such as Job.
            name: Name of the object.
            uid: Delete only the object with this uid, not a new one with the same name.
            propagation: Deletion of dependents: Background, Foreground or Orphan.
            grace_seconds: Grace period of a pod; None for the one in its spec.

        Returns:
            False if the object did not exist.
        """
        options: KubernetesObject = {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": propagation}
        options |= {"preconditions": {"uid": uid}} if uid else {}
        options |= {} if grace_seconds is None else {"gracePeriodSeconds": grace_seconds}
        request = ApiRequest("delete", KINDS[kind], self._namespace_of(kind), name, "DELETE", body=options)
        may_be_deleted = False

        def delete_once() -> bool:
            nonlocal may_be_deleted
            try:
                self._client.send_once(request)
            except (NotFoundError, UidConflictError):
                return may_be_deleted  # by an earlier attempt whose response was lost
            except TransientError as error:
                may_be_deleted |= error.ambiguous
                raise
            return True

        return self._client.retry(delete_once)

    def _namespace_of(self, kind: str) -> str:
        return self.namespace if KINDS[kind].namespaced else ""

    def _list_request(self, kind: str, labels: str, fields: str, all_namespaces: bool = False) -> ApiRequest:
        query = {"labelSelector": labels, "fieldSelector": fields}
        return ApiRequest("list", KINDS[kind], "" if all_namespaces else self._namespace_of(kind), query=query)
