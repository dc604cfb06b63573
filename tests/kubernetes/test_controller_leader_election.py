"""Leader election of the controller: two candidates over the tests' API server."""

import re
import time
from datetime import UTC, datetime, timedelta

import api_statuses
import pytest
from api_statuses import Fault

from topwork.cluster.controller.runtime.leader_election import LEASE_NAME, LeaderElection, LeaseSettings

LEASES = "/leases"
QUICK = LeaseSettings(duration_seconds=1, renew_deadline_seconds=0.6, retry_seconds=0.1)


@pytest.fixture
def make_candidate(make_cluster):
    candidates = []

    def make(identity, settings=QUICK):
        candidate = LeaderElection(make_cluster(timeout_seconds=1.0, attempts=1), identity, settings)
        candidates.append(candidate)
        return candidate

    yield make
    for candidate in candidates:
        candidate._stop.set()


def until(condition, seconds=5.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def spec(api_server):
    return (api_server.get("Lease", LEASE_NAME) or {}).get("spec")


def test_the_first_candidate_creates_a_standard_lease(api_server, make_candidate):
    candidate = make_candidate("first")
    candidate.start()
    assert candidate.wait(5)
    lease = spec(api_server)
    texts = [lease.pop(key) for key in ("acquireTime", "renewTime")]
    assert all(re.fullmatch(r"....-..-..T..:..:..\.\d{6}Z", text) for text in texts)
    assert all(abs(datetime.fromisoformat(text) - datetime.now(UTC)) < timedelta(seconds=10) for text in texts)
    assert lease == {"holderIdentity": "first", "leaseDurationSeconds": 1, "leaseTransitions": 0}


def test_renewal_changes_only_the_renew_time(api_server, make_candidate):
    candidate = make_candidate("first")
    candidate.start()
    assert candidate.wait(5)
    before = spec(api_server)
    until(lambda: spec(api_server) != before)
    assert {key for key, value in spec(api_server).items() if value != before[key]} == {"renewTime"}
    assert candidate.is_leader


def test_only_one_of_many_candidates_leads(make_candidate):
    candidates = [make_candidate(f"candidate-{number}") for number in range(6)]
    for candidate in candidates:
        candidate.start()
    until(lambda: any(candidate.is_leader for candidate in candidates))
    for _ in range(20):
        assert sum(candidate.is_leader for candidate in candidates) == 1
        time.sleep(0.05)


def test_a_standby_takes_over_after_expiry_and_never_at_the_same_time(api_server, make_candidate):
    leader, standby = make_candidate("leader"), make_candidate("standby")
    leader.start()
    assert leader.wait(5)
    standby.start()
    time.sleep(0.3)
    leader._stop.set()  # as if the process were paused: it renews nothing and releases nothing
    stopped = time.monotonic()
    while not standby.is_leader:
        assert time.monotonic() < stopped + 5
        time.sleep(0.005)
    assert not leader.is_leader
    assert leader.is_lost
    assert time.monotonic() - stopped > 0.8
    assert spec(api_server)["holderIdentity"] == "standby"
    assert spec(api_server)["leaseTransitions"] == 1


@pytest.mark.parametrize("skew", [timedelta(hours=-1), timedelta(hours=1)])
def test_clock_skew_neither_shortens_nor_extends_a_lease(api_server, cluster, make_candidate, skew):
    def put_lease(number):
        at = (datetime.now(UTC) + skew).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        content = {"holderIdentity": "other", "leaseDurationSeconds": 1, "acquireTime": at, "renewTime": at}
        api_server.put({
            "apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": LEASE_NAME},
            "spec": content | {"leaseTransitions": number},
        })  # fmt: skip

    put_lease(0)
    candidate = make_candidate("late")
    candidate.start()
    for number in range(6):  # renewed for longer than its duration
        time.sleep(0.3)
        put_lease(number)
        assert not candidate.is_leader
    assert candidate.wait(3)


def test_a_released_lease_is_taken_over_immediately(api_server, make_candidate):
    slow = LeaseSettings(duration_seconds=60, renew_deadline_seconds=40, retry_seconds=0.1)
    leader, standby = make_candidate("leader", slow), make_candidate("standby", slow)
    leader.start()
    assert leader.wait(5)
    standby.start()
    leader.release()
    assert standby.wait(2)
    assert not leader.is_leader
    assert spec(api_server)["holderIdentity"] == "standby"


def test_release_leaves_the_lease_of_another_holder_alone(api_server, make_candidate):
    leader = make_candidate("leader")
    leader.start()
    assert leader.wait(5)
    leader._stop.set()
    leader._thread.join()
    api_server.patch("Lease", LEASE_NAME, {"spec": {"holderIdentity": "other"}})
    leader.release()
    assert spec(api_server)["holderIdentity"] == "other"


def test_a_lease_taken_by_another_process_is_lost_at_once(api_server, make_candidate):
    leader = make_candidate("leader", LeaseSettings(60, 40, 0.1))
    leader.start()
    assert leader.wait(5)
    api_server.patch("Lease", LEASE_NAME, {"spec": {"holderIdentity": "other", "leaseDurationSeconds": 60}})
    until(lambda: leader.is_lost)


def test_an_outage_until_the_renew_deadline_loses_the_lease(api_server, make_candidate):
    leader = make_candidate("leader")
    leader.start()
    assert leader.wait(5)
    api_server.inject(Fault(api_statuses.internal_error(), path=LEASES), times=1000)
    until(lambda: leader.is_lost)


@pytest.mark.parametrize("fault", [api_statuses.too_many_requests(), api_statuses.internal_error()])
def test_a_short_outage_does_not_lose_the_lease(api_server, make_candidate, fault):
    leader = make_candidate("leader", LeaseSettings(4, 2.0, 0.2))
    leader.start()
    assert leader.wait(5)
    api_server.inject(Fault(fault, path=LEASES), times=3)
    for _ in range(40):
        assert leader.is_leader
        time.sleep(0.025)


def test_a_candidate_waits_for_an_api_server_that_is_down(api_server, make_candidate):
    api_server.inject(Fault(api_statuses.internal_error(), path=LEASES), times=5)
    candidate = make_candidate("patient")
    candidate.start()
    assert candidate.wait(5)


def test_a_renewal_whose_response_is_lost_is_repeated(api_server, make_candidate):
    leader = make_candidate("leader", LeaseSettings(4, 2.0, 0.2))
    leader.start()
    assert leader.wait(5)
    api_server.inject(Fault(cut_after_bytes=0, path=LEASES), times=2)
    time.sleep(1.0)
    assert leader.is_leader
    assert spec(api_server)["leaseTransitions"] == 0
