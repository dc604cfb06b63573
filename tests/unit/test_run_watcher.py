"""Threads that watch a run: an error in any of them reaches the reader of the updates."""

from types import SimpleNamespace

from topwork.cluster.operations.follow import FollowTimings
from topwork.cluster.operations.run_watcher import RequestFailed, RunWatcher
from topwork.errors import SettingError


def make_watcher(**methods):
    cluster = SimpleNamespace(**methods)
    objects = SimpleNamespace(pods=[], jobs=[], deleted=frozenset())
    return RunWatcher(cluster, "tiny-1", FollowTimings(), lambda: objects, lambda _kind: set())


def test_unexpected_error_while_reading_a_log_is_reported():
    def fail(*_, **__):
        raise TypeError("a line that nobody expected")

    watcher = make_watcher(logs=fail)
    watcher.read_log("pod", "transfer")
    update = watcher._updates.get()
    assert isinstance(update, RequestFailed)
    assert isinstance(update.error, TypeError)


def test_account_without_access_to_events_follows_without_them(monkeypatch):
    def forbidden(*_):
        raise SettingError("events is forbidden")

    monkeypatch.setattr("topwork.cluster.operations.run_watcher.read_events", forbidden)
    watcher = make_watcher()
    thread = watcher._start(watcher._read_events)
    thread.join()
    assert watcher._updates.empty()
