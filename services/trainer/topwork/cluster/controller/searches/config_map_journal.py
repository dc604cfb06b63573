"""The journal of a search in a ConfigMap: the controller has no access to object storage."""

import base64
import gzip
import json
import zlib
from typing import TYPE_CHECKING

from topwork.clients.kubernetes import KubernetesObject
from topwork.clients.kubernetes.errors import ConflictError, NotFoundError
from topwork.errors import DataError
from topwork.search.journal import Event, JournalConflictError

if TYPE_CHECKING:
    from topwork.clients.kubernetes.cluster import Cluster

JOURNAL_KEY = "journal.jsonl.gz"
"""Key in `binaryData`: the events as JSON lines, compressed with gzip."""


class ConfigMapJournal:
    """A journal in an existing ConfigMap. Every event replaces it, if it has not changed since it was read.

    A ConfigMap holds 1 MiB. 1,000 trials with ten parameters, each of which climbs three rungs, need a third of that.

    Args:
        cluster: The cluster, with the namespace of the search.
        name: Name of the ConfigMap.
    """

    def __init__(self, cluster: "Cluster", name: str) -> None:
        self._cluster, self._name = cluster, name
        self._config_map: KubernetesObject = {}
        self._events: list[Event] = []

    def read(self, start: int = 0) -> list[Event]:
        """See `topwork.search.journal.Journal.read`.

        Raises:
            JournalConflictError: If the ConfigMap was deleted.
        """
        config_map = self._cluster.get("ConfigMap", self._name)
        if config_map is None:
            raise self._conflict("deleted")
        self._config_map, self._events = config_map, decode_events(config_map)
        return self._events[start:]

    def append(self, number: int, event: Event) -> None:
        """See `topwork.search.journal.Journal.append`.

        Raises:
            JournalConflictError: If an event with this number exists, or the ConfigMap was changed or deleted.
            SettingError: If the API server rejects the ConfigMap, such as one of more than 1 MiB.
        """
        if not self._config_map:
            self.read()
        if number != len(self._events):
            raise self._conflict("changed")
        events = [*self._events, event]
        data = (self._config_map.get("binaryData") or {}) | {JOURNAL_KEY: encode_events(events)}
        try:
            self._config_map = self._cluster.replace(self._config_map | {"binaryData": data})
        except (ConflictError, NotFoundError):
            # It is also the response to a repeated request whose first response was lost. The next read shows it.
            self._config_map = {}
            raise self._conflict("changed") from None
        self._events = events

    def _conflict(self, change: str) -> JournalConflictError:
        namespace = self._cluster.namespace
        return JournalConflictError(f"configmap/{self._name} in namespace {namespace} was {change} in the meantime.")


def encode_events(events: list[Event]) -> str:
    """Encode events for `binaryData`."""
    lines = "".join(f"{json.dumps(event, separators=(',', ':'))}\n" for event in events)
    return base64.b64encode(gzip.compress(lines.encode(), mtime=0)).decode()


def decode_events(config_map: KubernetesObject) -> list[Event]:
    """Decode the events of a ConfigMap; none if it is new.

    Raises:
        DataError: If they were edited.
    """
    encoded = (config_map.get("binaryData") or {}).get(JOURNAL_KEY)
    try:
        lines = gzip.decompress(base64.b64decode(encoded, validate=True)).splitlines() if encoded else []
        events = [json.loads(line) for line in lines]
        if not all(isinstance(event, dict) for event in events):
            raise ValueError("a line is not a JSON object")
    except (ValueError, EOFError, OSError, zlib.error) as error:
        name = config_map["metadata"]["name"]
        raise DataError(
            f"configmap/{name}: {JOURNAL_KEY} is not a journal of a search: {error}. Restore it, or delete the "
            "ConfigMap to start the search over; trials that are stored are not trained again."
        ) from None
    return events
