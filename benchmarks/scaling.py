"""Collectives and training steps of several nodes on this machine, and what they predict for clusters with GPUs.

    sudo python -m benchmarks.scaling [--rounds 5] [--measurements FILE]

Each node is a process in a network namespace of its own, pinned to one CPU core. Bandwidth and latency are limited as
`benchmarks.scaling_network` describes, so this needs root, `ip` and `tc`. All measurements are repeated in rounds, in
which they take turns; the tables contain medians, and the interquartile range as a share of the median. Without root,
or with `--predict`, the predictions are computed from the measurements in benchmarks/scaling_measurements.json.
docs/scaling.md contains the tables.
"""

import argparse
import json
import math
import os
import signal
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.scaling_model import (
    WORKLOADS,
    AllReduce,
    Cluster,
    RingCost,
    download_seconds,
    efficiency,
    fit_ring_cost,
    fit_variable_seconds,
    measured_overlap,
    relative_errors,
    smallest_batch,
    variable_seconds,
)
from benchmarks.scaling_network import Network, bridged_network, delayed_network

MEASUREMENTS = Path(__file__).with_name("scaling_measurements.json")
NODE = Path(__file__).with_name("scaling_node.py")
RATES = (None, 1e9, 3e8)
STEP_RATES = (1e9, 3e8)
FLOATS = (1, 250_000, 2_200_000, 5_250_000)
LATENCIES = (0.002, 0.005, 0.01)
LAYERS, BATCH_SIZE = 20, 512
GRADIENT_FLOATS = 20 * (512 * 512 + 512) + 513
PACK_BYTES = (0, 4 * 2**20)
REPEATS = 3

CLUSTER_NODES = (1, 2, 4, 8, 16, 32, 64)
CLUSTER_RATES = (25e9, 100e9, 400e9)
GPUS = 8

# The size of ImageNet (1.28 million images of 110 KB on average), and networks of a cluster.
DATASET_IMAGES, DATASET_BYTES = 1_281_167, 141e9
LIMIT_NODES = (2, 8, 64)
NODE_RATE, STORAGE_RATE = 100e9, 100e9


class Nodes:
    """The processes of all nodes."""

    def __init__(self, network: Network, bytes_per_pack: int) -> None:
        addresses = [f"{network.address(index)}:9112" for index in range(network.nodes)]
        environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}
        self._processes = [
            subprocess.Popen(
                [
                    *("ip", "netns", "exec", network.name(index)),
                    *("taskset", "--cpu-list", str(index % (os.cpu_count() or 1))),
                    *(sys.executable, str(NODE), str(index), str(bytes_per_pack), *addresses),
                ],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            for index in range(network.nodes)
        ]
        self._answers()

    def measure(self, name: str, **arguments: Any) -> list[float]:
        """Return the seconds of each repetition, on the slowest node."""
        for process in self._processes:
            assert process.stdin
            process.stdin.write(json.dumps({"measure": name, "repeats": REPEATS, **arguments}) + "\n")
            process.stdin.flush()
        return [max(seconds) for seconds in zip(*self._answers(), strict=True)]

    def _answers(self) -> list[list[float]]:
        lines = [process.stdout.readline() for process in self._processes if process.stdout]
        if not all(lines):
            raise RuntimeError("A node failed. Run benchmarks/scaling_node.py by hand to see its error.")
        return [json.loads(line) for line in lines]

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.communicate()


@contextmanager
def running_nodes(network: Network, bytes_per_pack: int = 0) -> Iterator[Nodes]:
    """Start the nodes, and end them afterwards."""
    nodes = Nodes(network, bytes_per_pack)
    try:
        yield nodes
    finally:
        nodes.close()


Samples = dict[tuple[Any, ...], list[float]]


def measure_bandwidths(samples: Samples, count: int, rounds: int) -> None:
    """Measure all-reduces and the creation of variables on a number of nodes with limited bandwidth."""
    with bridged_network(count) as network, running_nodes(network) as nodes:
        for _ in range(rounds):
            for rate in RATES:
                network.limit(rate)
                for floats in FLOATS if count == 2 else FLOATS[:3]:
                    samples["all_reduce", count, floats * 4, rate, 0.0] += nodes.measure("all_reduce", floats=floats)
            network.limit(None)
            samples["variable", count, 0.0] += nodes.measure("create_variables", count=20)


def measure_latencies(samples: Samples, latency_seconds: float, rounds: int) -> None:
    """Measure small all-reduces and the creation of variables on two nodes with latency."""
    with delayed_network(latency_seconds) as network, running_nodes(network) as nodes:
        for _ in range(rounds):
            samples["all_reduce", 2, 4, None, latency_seconds] += nodes.measure("all_reduce", floats=1)
            samples["variable", 2, latency_seconds] += nodes.measure("create_variables", count=20)


def measure_steps(samples: Samples, bytes_per_pack: int, rounds: int) -> None:
    """Measure training steps of two nodes: alone, together, and the all-reduce of as many gradients."""
    with bridged_network(2) as network, running_nodes(network, bytes_per_pack) as nodes:
        for _ in range(rounds):
            for rate in STEP_RATES:
                network.limit(rate)
                arguments = {"layers": LAYERS, "batch_size": BATCH_SIZE}
                key = (bytes_per_pack, rate)
                samples["alone", *key] += nodes.measure("train", together=False, **arguments)
                samples["together", *key] += nodes.measure("train", together=True, **arguments)
                samples["gradients", *key] += nodes.measure("all_reduce", floats=GRADIENT_FLOATS)


def measure_all(rounds: int) -> list[dict[str, Any]]:
    """Run all measurements; each result is a key, the median and the interquartile range."""
    samples: Samples = defaultdict(list)
    for count in (2, 3, 4):
        measure_bandwidths(samples, count, rounds)
    for latency_seconds in LATENCIES:
        measure_latencies(samples, latency_seconds, rounds)
    for bytes_per_pack in PACK_BYTES:
        measure_steps(samples, bytes_per_pack, rounds)
    results = []
    for key, seconds in samples.items():
        low, median, high = statistics.quantiles(seconds, n=4)
        results.append({"key": [*key], "median": round(median, 6), "iqr": round(high - low, 6)})
    return results


class Results:
    """Measurements, and the parameters that follow from them."""

    def __init__(self, measured: dict[str, Any]) -> None:
        self._cores = measured["cores"]
        self._seconds = {tuple(one["key"]): one for one in measured["seconds"]}

    def keys(self, kind: str) -> list[tuple[Any, ...]]:
        """Return the keys of a kind of measurement, without the kind."""
        return [key[1:] for key in self._seconds if key[0] == kind]

    def seconds(self, *key: Any) -> float:
        """Return the median of a measurement."""
        return float(self._seconds[key]["median"])

    def noise(self, kinds: set[str]) -> float:
        """Return the median of interquartile range / median."""
        return statistics.median(one["iqr"] / one["median"] for key, one in self._seconds.items() if key[0] in kinds)

    def all_reduces(self) -> list[tuple[AllReduce, float]]:
        """Return the measured all-reduces and their seconds."""
        return [
            (
                AllReduce(nodes, size, rate or math.inf, latency, max(1.0, nodes / self._cores)),
                self.seconds("all_reduce", nodes, size, rate, latency),
            )
            for nodes, size, rate, latency in self.keys("all_reduce")
        ]

    def cost(self) -> RingCost:
        """Return the fitted parameters."""
        return fit_ring_cost(self.all_reduces())

    def overlap(self, bytes_per_pack: int, rate: float) -> float:
        """Return the measured overlap of a training step."""
        return measured_overlap(
            *(self.seconds(kind, bytes_per_pack, rate) for kind in ("alone", "gradients", "together"))
        )


def bandwidth_name(rate: float | None) -> str:
    """Return a bandwidth for a table."""
    if rate is None or math.isinf(rate):
        return "not limited"
    return f"{rate / 1e9:g} Gbit/s"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """Return a table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows]).replace(" --- ", "---")


def all_reduce_table(results: Results) -> str:
    """Return measured and predicted times of all-reduces."""
    cost = results.cost()
    rows = [
        [
            str(operation.nodes),
            "4 B" if operation.size == 4 else f"{operation.size / 1e6:g} MB",
            bandwidth_name(operation.bits_per_second),
            f"{operation.latency_seconds * 1000:g} ms",
            f"{seconds * 1000:.1f} ms",
            f"{cost.seconds(operation) * 1000:.1f} ms",
        ]
        for operation, seconds in results.all_reduces()
    ]
    return markdown(["nodes", "tensor", "bandwidth", "added latency", "measured", "model"], rows)


def step_table(results: Results) -> str:
    """Return measured times of training steps on two nodes."""
    rows = [
        [
            bandwidth_name(rate),
            "one" if not pack else f"{pack / 2**20:g} MiB each",
            *(f"{results.seconds(kind, pack, rate) * 1000:.0f} ms" for kind in ("alone", "gradients", "together")),
            f"{results.overlap(pack, rate):.0%}",
        ]
        for pack, rate in results.keys("alone")
    ]
    return markdown(["bandwidth", "all-reduces", "step alone", "all-reduce", "step together", "hidden"], rows)


def variable_table(results: Results) -> str:
    """Return measured times to create a variable."""
    rows = [
        [str(nodes), f"{latency * 1000:g} ms", f"{results.seconds('variable', nodes, latency) * 1000:.1f} ms"]
        for nodes, latency in results.keys("variable")
    ]
    return markdown(["nodes", "added latency", "time for each variable"], rows)


def efficiency_table(results: Results) -> str:
    """Return the predicted efficiency of clusters with GPUs."""
    share = min(1.0, results.cost().link_share)
    rows = [
        [workload.name, bandwidth_name(rate), *(f"{value:.0%}" for value in values), *batches]
        for workload in WORKLOADS
        for rate in CLUSTER_RATES
        for values in [[efficiency(workload, Cluster(n, GPUS, rate, share)) for n in CLUSTER_NODES[1:]]]
        for batches in [[str(smallest_batch(workload, Cluster(64, GPUS, rate, share), 0.9))]]
    ]
    header = ["model", "bandwidth", *(f"{nodes} nodes" for nodes in CLUSTER_NODES[1:]), "batch for 90 %"]
    return markdown(header, rows)


def limits_table(results: Results) -> str:
    """Return the predicted time of everything that does not become faster with more nodes."""
    fitted = fit_variable_seconds(
        [
            (nodes, results.seconds("variable", nodes, latency))
            for nodes, latency in results.keys("variable")
            if not latency
        ]
    )
    share = min(1.0, results.cost().link_share)
    rows = []
    for workload in WORKLOADS:
        for nodes in LIMIT_NODES:
            cluster = Cluster(nodes, GPUS, NODE_RATE, share)
            speed = workload.images_per_second * GPUS * nodes * efficiency(workload, cluster)
            seconds = [
                workload.created_variables * variable_seconds(fitted, nodes),
                download_seconds(DATASET_BYTES, nodes, NODE_RATE, STORAGE_RATE),
                download_seconds(workload.checkpoint_bytes, nodes, NODE_RATE, STORAGE_RATE),
                download_seconds(workload.checkpoint_bytes, 1, NODE_RATE, STORAGE_RATE),
                DATASET_IMAGES / speed,
            ]
            steps = f"{DATASET_IMAGES // (workload.batch_size * GPUS * nodes):,}"
            rows.append([workload.name, str(nodes), *(f"{value:,.1f} s" for value in seconds), steps])
    header = ["model", "nodes", "create variables", "download dataset", "read checkpoint", "store checkpoint", "epoch"]
    return markdown([*header, "steps"], rows)


def tables(results: Results) -> dict[str, str]:
    """Return all tables of docs/scaling.md by their titles."""
    return {
        "All-reduce": all_reduce_table(results),
        "Training steps": step_table(results),
        "Variables": variable_table(results),
        "Predicted efficiency": efficiency_table(results),
        "Predicted limits": limits_table(results),
    }


def main() -> None:
    """Measure, fit the model, and print all tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--predict", action="store_true", help="measure nothing")
    parser.add_argument("--measurements", type=Path, default=MEASUREMENTS, help="file to write, or to read")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that namespaces are deleted
    if not options.predict and os.geteuid() != 0:
        print("Network namespaces require root: the tables are those of an earlier measurement.\n")
        options.predict = True
    if not options.predict:
        lines = ",\n".join(json.dumps(one) for one in measure_all(options.rounds))
        options.measurements.write_text(f'{{"cores": {os.cpu_count()}, "seconds": [\n{lines}\n]}}\n')
    results = Results(json.loads(options.measurements.read_text()))
    for title, table in tables(results).items():
        print(f"{title}\n\n{table}\n")
    errors = [abs(error) for error in relative_errors(results.cost(), results.all_reduces())]
    print(results.cost())
    print(f"Relative error of the model: median {statistics.median(errors):.0%}, largest {max(errors):.0%}")
    print(f"Noise: all-reduce {results.noise({'all_reduce'}):.0%}, steps {results.noise({'alone', 'together'}):.0%}")


if __name__ == "__main__":
    main()
