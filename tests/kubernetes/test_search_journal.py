"""The journal of a search in a ConfigMap."""

import base64
import gzip
import random
from typing import Any

import pytest
from api_server import ApiServer
from api_statuses import Fault

from topwork.clients.kubernetes.cluster import Cluster
from topwork.cluster.controller.searches.config_map_journal import JOURNAL_KEY, ConfigMapJournal, encode_events
from topwork.errors import DataError, UnavailableError
from topwork.search.journal import JournalConflictError

NAME = "flowers-0123abcd-journal"
MAX_BYTES = 1024**2
"""Limit of the data of a ConfigMap."""
Object = dict[str, Any]


@pytest.fixture
def config_map(cluster: Cluster) -> Object:
    return cluster.create({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": NAME}, "data": {"a": "b"}})


@pytest.fixture
def journal(cluster: Cluster, config_map: Object) -> ConfigMapJournal:
    return ConfigMapJournal(cluster, NAME)


def event(number: int) -> Object:
    return {"event": "started", "number": number}


def test_events_are_read_in_the_order_in_which_they_were_appended(cluster: Cluster, journal: ConfigMapJournal) -> None:
    assert journal.read() == []
    for number in range(3):
        journal.append(number, event(number))
    other = ConfigMapJournal(cluster, NAME)
    assert other.read() == [event(0), event(1), event(2)]
    assert other.read(2) == [event(2)]
    stored = cluster.get("ConfigMap", NAME)
    assert stored is not None
    assert stored["data"] == {"a": "b"}


def test_of_two_coordinators_only_one_appends_an_event(cluster: Cluster, journal: ConfigMapJournal) -> None:
    other = ConfigMapJournal(cluster, NAME)
    assert other.read() == journal.read() == []
    other.append(0, event(0))
    with pytest.raises(JournalConflictError, match=f"configmap/{NAME} in namespace team-a was changed"):
        journal.append(0, event(7))
    assert journal.read() == [event(0)]
    journal.append(1, event(1))
    with pytest.raises(JournalConflictError):
        other.append(0, event(7))
    assert other.read() == [event(0), event(1)]


def test_an_event_whose_response_was_lost_is_found_by_the_next_read(
    api_server: ApiServer, journal: ConfigMapJournal
) -> None:
    journal.append(0, event(0))
    api_server.inject(Fault(cut_after_bytes=0, method="PUT"))
    with pytest.raises(JournalConflictError):
        journal.append(1, event(1))
    assert journal.read() == [event(0), event(1)]


def test_an_outage_appends_nothing(api_server: ApiServer, journal: ConfigMapJournal) -> None:
    api_server.inject(Fault(delay_seconds=0.0, cut_after_bytes=0, method="GET"), times=5)
    with pytest.raises(UnavailableError):
        journal.read()
    assert journal.read() == []


def test_a_deleted_journal_is_not_created_again(cluster: Cluster, journal: ConfigMapJournal) -> None:
    journal.append(0, event(0))
    cluster.delete("ConfigMap", NAME)
    with pytest.raises(JournalConflictError):
        journal.append(1, event(1))
    with pytest.raises(JournalConflictError, match="was deleted"):
        journal.read()
    assert cluster.get("ConfigMap", NAME) is None


@pytest.mark.parametrize(
    "content", [b"no gzip", b"\x1f\x8b\x08cut", base64.b64decode(encode_events([]))[:-9], gzip.compress(b"[]")]
)
def test_a_damaged_journal_is_refused(
    cluster: Cluster, config_map: Object, journal: ConfigMapJournal, content: bytes
) -> None:
    cluster.replace(config_map | {"binaryData": {JOURNAL_KEY: base64.b64encode(content).decode()}})
    with pytest.raises(
        DataError, match=f"configmap/{NAME}: journal.jsonl.gz is not a journal of a search: .*Restore it"
    ):
        journal.read()


def test_a_config_map_holds_a_thousand_trials_that_climb_three_rungs() -> None:
    draw = random.Random(0)
    paths = [f"fineTune.optimizer.parameter{number}" for number in range(10)]
    events: list[Object] = []
    for number in range(1000):
        time = f"2026-11-30T{number // 60 % 24:02}:{number % 60:02}:00Z"
        params = {path: float(f"{draw.random():.5g}") for path in paths}
        digest = f"{draw.getrandbits(64):016x}"
        events.append({"event": "started", "time": time, "number": number, "params": params, "digest": digest})
        for epochs in (2, 7, 20):
            metrics = {name: draw.random() for name in ("accuracy", "f1", "auc", "loss")}
            result = {"event": "finished", "time": time, "number": number, "state": "paused", "epochs": epochs}
            result |= {"run": f"flowers-{number}-{draw.getrandbits(32):08x}", "value": metrics["accuracy"]}
            result |= {"metrics": metrics, "seconds": draw.random() * 1000, "gpu_seconds": float(draw.randrange(9999))}
            events += [result, {"event": "promoted", "time": time, "number": number, "epochs": epochs}]
    size = len(base64.b64decode(encode_events(events)))
    print(f"\n{len(events)} events: {size / 1024:.0f} KiB")
    assert size < MAX_BYTES
