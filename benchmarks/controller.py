"""Requests and memory of the controller at rest, with 1,000 finished and 50 running TransferJobs."""

import argparse
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from api_server import ApiServer
from controller_process import Controller
from sample_objects import CPU_SPEC
from simulated_controllers import SimulatedControllers

from topwork.cluster.definition import TRANSFER_SEARCH, definition
from topwork.cluster.names import CONTROLLER_MANAGER
from topwork.cluster.status.objects import name_of

SETTLE_SECONDS = 30.0


def main() -> None:
    """Create all TransferJobs, wait until nothing changes any more, and count requests."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--finished", type=int, default=1000)
    parser.add_argument("--running", type=int, default=50)
    parser.add_argument("--minutes", type=float, default=3.0)
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as directory,
        ApiServer(crds=[definition(), definition(TRANSFER_SEARCH)]) as server,
        SimulatedControllers(server, stage_seconds=0.0) as simulated,
        Controller(server.kubeconfig(Path(directory) / "kubeconfig")) as controller,
    ):
        controller.wait_until_leading()
        apply(server, "finished", 1)
        wait_for(server, "Complete", 1)
        # The API server of the tests is too slow to run all of them: the others are copies.
        copy(server, server.get("TransferJob", "finished-0"), options.finished - 1)
        simulated.kubelet.stage_seconds = 1e6
        apply(server, "running", options.running)
        wait_for(server, "Running", options.running)
        time.sleep(SETTLE_SECONDS)
        before = len(server.requests)
        time.sleep(60 * options.minutes)
        report(server.requests[before:], options.minutes)
        assert not any(name_of(job).startswith("copy-") for job in server.list("Job")), "finished copies ran again"
        print(f"resident memory: {resident_mib(controller.process.pid):.0f} MiB")
        assert controller.stop() == 0


def apply(server: ApiServer, prefix: str, count: int) -> None:
    """Create TransferJobs as users do."""
    for number in range(count):
        obj: dict[str, Any] = {
            "apiVersion": "topwork.dev/v1alpha1",
            "kind": "TransferJob",
            "metadata": {"name": f"{prefix}-{number}", "namespace": "team-a", "generation": 1},
            "spec": CPU_SPEC,
        }
        server.put(obj)


def copy(server: ApiServer, finished: dict[str, Any], count: int) -> None:
    """Create copies of a finished TransferJob with its status."""
    for number in range(count):
        metadata = {"name": f"copy-{number}", "namespace": finished["metadata"]["namespace"]}
        server.put({**finished, "metadata": metadata}, manager=CONTROLLER_MANAGER)


def wait_for(server: ApiServer, state: str, count: int) -> None:
    """Wait until this many TransferJobs have a state."""
    while sum((obj.get("status") or {}).get("state") == state for obj in server.list("TransferJob")) < count:
        time.sleep(0.5)


def report(requests: list[Any], minutes: float) -> None:
    """Print the number of requests a minute by kind."""
    kinds: Counter[str] = Counter()
    for request in requests:
        plural = request.path.partition("/namespaces/team-a/")[2].split("/")[0] or request.path
        kinds[f"{'WATCH' if 'watch' in request.query else request.method} {plural}"] += 1
    print(f"requests a minute at rest: {len(requests) / minutes:.1f}")
    for kind, count in kinds.most_common():
        print(f"  {kind:<24} {count / minutes:6.1f}")


def resident_mib(pid: int) -> float:
    """Return the resident memory of a process."""
    (line,) = (line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    main()
