"""A job on two nodes whose nodes are killed, stopped and frozen many times has the results of an uninterrupted one.

The short version has a few interruptions. With TOPWORK_LONG=1, there are 40. TOPWORK_CHAOS_SEED repeats the random
choices of an earlier run, but timing still varies.
"""

import os
import random
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.chaos.interrupted_nodes import (
    MILESTONES,
    Interruption,
    NodesRun,
    measure_windows,
)
from tests.chaos.interrupted_run import BUCKET, EPOCH_ENDED, SPEC, make_job, write_images
from tests.chaos.network_namespaces import Link, Network, connected_namespaces
from tests.chaos.results import (
    assert_identical_results,
    assert_only_complete_objects_are_visible,
    print_now,
)
from tests.preloaded_python import PreloadedPython

from topwork.clients.s3.storage import StorageSettings, create_bucket

LONG = os.environ.get("TOPWORK_LONG") == "1"
# SIGSTOP freezes a node until the others have ended, then kills it; SIGCONT lets it continue instead.
LONG_EVENTS = {"SIGKILL": 22, "SIGTERM": 10, "SIGSTOP": 4, "SIGCONT": 4}
EVENTS = LONG_EVENTS if LONG else {"SIGKILL": 1, "SIGTERM": 1, "SIGSTOP": 1}
# Maximum per run: a stage that resumes close to its end completes.
MAX_EVENTS = {"pull": 1, "transfer": 5, "fine-tune": 6} if LONG else {"pull": 0, "transfer": 2, "fine-tune": 6}
# A resumed stage is shorter than that of the uninterrupted run.
WINDOW_FRACTION = 0.7
# Stage, node and links. A node without storage cannot ask either whether the run is complete.
LOSSES: list[tuple[str, int, list[Link]]] = [("transfer", 1, ["nodes"])]
if LONG:
    LOSSES += [("fine-tune", 1, ["nodes", "storage"]), ("fine-tune", 0, ["nodes", "storage"])]
NODES = 2
OVERRIDES: dict[str, Any] = {
    # The features of the first convolution are cached: fine-tuning unfreezes the other two.
    "model": {**SPEC["model"], "base": {"cnn": {"filters": [4, 6, 8]}}},
    "transfer": {**SPEC["transfer"], "epochs": 8, "batchSize": 12},
    "fineTune": {
        **SPEC["fineTune"],
        "unfreeze": {"steps": [{"layers": 1, "epochs": 3, "learningRate": 0.002},
                               {"layers": 2, "epochs": 3, "learningRate": 0.001}]},
        "featureCache": {"use": "on", "views": 2},
    },
    "compute": {"gpus": 0, "nodes": NODES, "checkpointMinutes": 0.004},
}  # fmt: skip


@dataclass
class Uninterrupted:
    """An uninterrupted run, and how long its milestones lasted, in seconds."""

    run: NodesRun
    windows: dict[str, dict[str, float]]
    images: Path


@pytest.fixture(scope="module")
def reference(
    tmp_path_factory: pytest.TempPathFactory, s3_settings: StorageSettings, preloaded_python: PreloadedPython
) -> Iterator[Uninterrupted]:
    create_bucket(s3_settings, BUCKET)
    directory = tmp_path_factory.mktemp("nodes")
    images = write_images(directory / "images")
    job = make_job(images, f"s3://{BUCKET}/nodes-reference", **OVERRIDES)
    run = NodesRun(job, directory / "reference", s3_settings, preloaded_python)
    try:
        windows = measure_windows(run)
        run.complete()
        assert {stage: set(reached) for stage, reached in windows.items()} == {
            stage: set(milestones) for stage, milestones in MILESTONES.items()
        }
        yield Uninterrupted(run, windows, images)
    finally:
        run.close()


def interrupt_at_random(run: NodesRun, events: list[str], reference: Uninterrupted, generator: random.Random) -> None:
    """Run a job to its end, and interrupt its nodes at random moments with the remaining events."""
    for stage, maximum in MAX_EVENTS.items():
        for _ in range(maximum):
            if not events or run.is_complete:
                break
            milestone = generator.choice(MILESTONES[stage])
            seconds = generator.uniform(0.0, WINDOW_FRACTION * reference.windows[stage][milestone])
            node = generator.randrange(NODES)
            if run.reach(stage, milestone, seconds) and run.interrupt(node, events[-1], milestone):
                events.pop()
                assert_only_complete_objects_are_visible(run.storage)
    run.complete()


@pytest.mark.timeout(4 * 3600 if LONG else 1200)
def test_nodes_interrupted_at_random_moments_have_the_results_of_uninterrupted_ones(
    tmp_path, s3_settings, preloaded_python, reference, capsys
):
    seed = int(os.environ.get("TOPWORK_CHAOS_SEED") or random.SystemRandom().randrange(2**32))
    generator, started = random.Random(seed), time.monotonic()
    print_now(capsys, f"\nseed {seed}: set TOPWORK_CHAOS_SEED={seed} to repeat these random choices")
    events = [event for event, count in EVENTS.items() for _ in range(count)]
    generator.shuffle(events)
    interruptions: list[Interruption] = []
    compared, runs = 0, 0
    while events:
        name = f"nodes-{runs}"
        job = make_job(reference.images, f"s3://{BUCKET}/{name}", **OVERRIDES)
        run = NodesRun(job, tmp_path / name, s3_settings, preloaded_python, generator=generator)
        try:
            interrupt_at_random(run, events, reference, generator)
        finally:
            run.close()
            print_now(capsys, "\n".join([f"{name}:", *(f"  {interruption}" for interruption in run.interruptions)]))
        compared += assert_identical_results(run, reference.run)[0]
        assert_only_complete_objects_are_visible(run.storage)
        assert run.failed_replacements == 0
        interruptions += run.interruptions
        runs += 1
    print_now(capsys, f"{describe(interruptions)} in {runs} runs and {time.monotonic() - started:.0f} s")
    print_now(capsys, f"{compared} weights are identical, bit for bit")
    assert Counter(interruption.event for interruption in interruptions) == EVENTS


def lose_network(run: NodesRun, network: Network, node: int, links: list[Link]) -> None:
    """Disconnect a node until all nodes have ended, which must not take more than a minute."""
    stage, processes = run.stage, run.running()
    started = run.mark_event()
    for link in links:
        network.set_link(node, link, "down")
    ends = run.expect_end(processes, started)
    run.mark_event()
    for link in links:
        network.set_link(node, link, "up")
    run.interruptions.append(Interruption(f"loss of {' and '.join(links)}", stage, EPOCH_ENDED, node, ends, 0))
    assert [code for _, _, code in ends] == [75] * NODES, run.describe()


@pytest.mark.timeout(1200)
def test_nodes_in_separate_networks_end_when_a_link_is_lost_and_resume(
    tmp_path, s3_settings, preloaded_python, reference, capsys
):
    job = make_job(reference.images, f"s3://{BUCKET}/nodes-partition", **OVERRIDES)
    with connected_namespaces(NODES, s3_settings.endpoint_url) as network:
        run = NodesRun(job, tmp_path / "run", s3_settings, preloaded_python, network.places)
        try:
            for stage, node, links in LOSSES:
                assert run.reach(stage, EPOCH_ENDED, 0.0), run.describe()
                lose_network(run, network, node, links)
            run.complete()
        finally:
            run.close()
            print_now(capsys, "\n".join(["", *map(str, run.interruptions)]))
    compared, _ = assert_identical_results(run, reference.run)
    print_now(capsys, f"{compared} weights are identical, bit for bit")
    assert_only_complete_objects_are_visible(run.storage)


def describe(interruptions: list[Interruption]) -> str:
    """Describe how long the other nodes took to end after each kind of event."""
    parts = []
    for event in EVENTS:
        found = [interruption for interruption in interruptions if interruption.event == event]
        seconds = [value for interruption in found for value in interruption.seconds]
        longest = f", at most {max(seconds):.1f} s" if seconds else ""
        times = f" (others ended after {statistics.median(seconds):.1f} s{longest})" if seconds else ""
        parts.append(f"{len(found)} {event}{times}")
    return ", ".join(parts)
