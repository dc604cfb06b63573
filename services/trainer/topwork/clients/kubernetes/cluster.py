"""The API server of a Kubernetes cluster, in plain objects; only `edge.kubernetes*` knows the official client.

Objects go in and come out as they stand in YAML. What the server refuses leaves as `SettingError`, what passes is tried
again and leaves as `UnavailableError` in the end; `edge.kubernetes_errors` says which.
"""

from collections.abc import Iterator
from itertools import islice

from topwork.clients.kubernetes import KubernetesObject
from topwork.clients.kubernetes.config import ClusterSettings
from topwork.clients.kubernetes.errors import MissingError, PassingError, ReplacedError
from topwork.clients.kubernetes.logs import LogReader
from topwork.clients.kubernetes.requests import KINDS, Api, Asked
from topwork.clients.kubernetes.watch import Change, Watch

__all__ = ["Change", "Cluster", "ClusterSettings", "KubernetesObject", "connect"]


MANAGER = "topwork"
# A page of metrics is written in milliseconds; a pod or node that is silent for longer does not answer.
PAGE_SECONDS = 5.0
# Such a page has some hundreds; what a pod sends without end is not waited for.
PAGE_LINES = 100_000
DEFAULTS = ClusterSettings()


def connect(settings: ClusterSettings = DEFAULTS) -> "Cluster":
    """Connect to a cluster as kubectl would; nothing is asked of it yet.

    Raises:
        SettingError: If there is no configuration, no such context, or it can't be used.
    """
    return Cluster(Api(settings))


class Cluster:
    """A cluster, and a namespace in it.

    Args:
        api: Its API server.
    """

    def __init__(self, api: Api) -> None:
        self._api = api

    @property
    def namespace(self) -> str:
        """Namespace that everything is about."""
        return self._api.connection.namespace

    @property
    def server(self) -> str:
        """URL of the API server, for messages."""
        return self._api.connection.server

    @property
    def warnings(self) -> list[str]:
        """What the server has warned of so far, such as a Pod Security level that the pods of a Job would not meet."""
        return self._api.warnings

    def apply(self, manifest: KubernetesObject, *, dry_run: bool = False) -> KubernetesObject:
        """Create an object, or merge into the one that is there (server-side apply, nothing taken by force).

        Args:
            manifest: The object; its namespace is filled in where it has none.
            dry_run: Let the server check it and keep nothing.

        Returns:
            The object as the server has it now.

        Raises:
            SettingError: If the server refuses it.
            UnavailableError: If the server can't be reached or stays overloaded.
        """
        kind = KINDS[manifest["kind"]]
        metadata = dict(manifest["metadata"])
        if kind.namespaced:
            metadata.setdefault("namespace", self.namespace)
        query = {"fieldManager": MANAGER, "fieldValidation": "Strict", "dryRun": "All" if dry_run else None}
        namespace, name = metadata.get("namespace", ""), metadata["name"]
        body = manifest | {"metadata": metadata}
        return self._api.ask(Asked("apply", kind, namespace, name, "PATCH", query=query, body=body))

    def get(self, kind: str, name: str) -> KubernetesObject | None:
        """Return an object; None if it is not there."""
        try:
            return self._api.ask(self._asked("read", kind, name))
        except MissingError:
            return None

    def list(
        self, kind: str, *, labels: str = "", fields: str = "", all_namespaces: bool = False
    ) -> list[KubernetesObject]:
        """List objects.

        Args:
            kind: Kind of object, such as Pod.
            labels: Label selector, such as `topwork.dev/job=cats`.
            fields: Field selector, such as `status.phase=Failed`.
            all_namespaces: Of all namespaces.
        """
        return self._api.items(self._selection("list", kind, labels, fields, all_namespaces))[0]

    def watch(self, kind: str, *, labels: str = "", fields: str = "", seconds: float) -> Iterator[Change]:
        """Watch objects: those that are there come first, as ADDED, then what happens to them.

        A stream that breaks off is taken up again. Objects may come twice then; none that lasts is missed, and one
        that went meanwhile comes as DELETED.

        Args:
            kind: Kind of object.
            labels: Label selector.
            fields: Field selector.
            seconds: How long.

        Yields:
            Changes.

        Raises:
            SettingError: If the server refuses.
            UnavailableError: If the server can't be reached, several times in a row.
        """
        return Watch(self._api, self._selection("list", kind, labels, fields)).changes(seconds)

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
        """Read the log of a container, line by line; nothing where it has not started yet or its pod is gone.

        Args:
            pod: Name of the pod.
            container: Name of the container.
            follow: Go on until the container ends; a stream that breaks off is taken up where it was.
            since: Only lines from this time on (RFC 3339, whole seconds).
            tail: Only so many of the last lines.
            timestamps: Each line begins with its time.

        Yields:
            Lines without their end.
        """
        asked = Asked("read", KINDS["Pod"], self.namespace, pod, part="log")
        reader = LogReader(self._api, asked, container)
        return reader.read(follow=follow, since=since, tail=tail, timestamps=timestamps)

    def page(self, pod: str, port: int, path: str) -> str:
        """Read a page that a pod serves over HTTP, through the API server; tried once, since it is read again soon.

        Args:
            pod: Name of the pod.
            port: Port in it.
            path: Path without its first slash.

        Returns:
            The page.

        Raises:
            SettingError: If the server refuses, or the pod is gone.
            UnavailableError: If the server or the pod does not answer.
        """
        asked = Asked("read", KINDS["Pod"], self.namespace, f"{pod}:{port}", part=f"proxy/{path}")
        with self._api.stream(asked, PAGE_SECONDS) as lines:
            return "\n".join(islice(lines, PAGE_LINES)) + "\n"

    def delete(
        self,
        kind: str,
        name: str,
        *,
        uid: str | None = None,
        propagation: str = "Background",
        grace_seconds: int | None = None,
    ) -> bool:
        """Ask for an object to be deleted. It may stay for a while: its pods stop first, or its dependents go.

        Args:
            kind: Kind of object.
            name: Its name.
            uid: Only the object with this uid, not one that was made anew under the name.
            propagation: What becomes of what it owns: Background, Foreground or Orphan.
            grace_seconds: What a pod is given to stop; None: what it says itself.

        Returns:
            False if it was not there.
        """
        options: KubernetesObject = {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": propagation}
        options |= {"preconditions": {"uid": uid}} if uid else {}
        options |= {} if grace_seconds is None else {"gracePeriodSeconds": grace_seconds}
        asked = Asked("delete", KINDS[kind], self._place(kind), name, "DELETE", body=options)
        return self._api.insist(_Deletion(self._api, asked))

    def _asked(self, verb: str, kind: str, name: str) -> Asked:
        return Asked(verb, KINDS[kind], self._place(kind), name)

    def _place(self, kind: str) -> str:
        return self.namespace if KINDS[kind].namespaced else ""

    def _selection(self, verb: str, kind: str, labels: str, fields: str, everywhere: bool = False) -> Asked:
        query = {"labelSelector": labels, "fieldSelector": fields}
        return Asked(verb, KINDS[kind], "" if everywhere else self._place(kind), query=query)


class _Deletion:
    """One deletion, however often it is asked for: what is gone after an answer got lost was deleted by it."""

    def __init__(self, api: Api, asked: Asked) -> None:
        self._api, self._asked = api, asked
        self._may_be_done = False

    def __call__(self) -> bool:
        try:
            self._api.ask_once(self._asked)
        except (MissingError, ReplacedError):
            return self._may_be_done
        except PassingError as error:
            self._may_be_done |= error.ambiguous
            raise
        return True
