"""A model of the time of a training step on several nodes. Pure functions; docs/scaling.md describes it.

Two mechanisms are modelled. `RingCost` is that of TensorFlow's collectives over gRPC between CPUs, and fitted to the
measurements of `benchmarks/scaling.py`. `nccl_seconds` is that of NCCL between GPUs, with the constants that NVIDIA
publishes in the source of NCCL; it was not measured.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

TYPICAL = np.array([1e-3, 2.0, 1e-9, 1e-9, 0.9])
"""Parameters of RingCost at which the fit starts."""

GRADIENT_BYTES = 4
"""Bytes of a gradient: that of a float32 variable is float32, also with mixed precision."""


@dataclass(frozen=True)
class AllReduce:
    """An all-reduce between nodes with one device each.

    Attributes:
        nodes: Number of nodes.
        size: Bytes of the tensor on each node.
        bits_per_second: Bandwidth of each node in each direction; infinite if it is not limited.
        latency_seconds: Time from the sender to the receiver.
        nodes_per_core: Nodes that share a CPU core, at least 1.
    """

    nodes: int
    size: float
    bits_per_second: float = math.inf
    latency_seconds: float = 0.0
    nodes_per_core: float = 1.0

    @property
    def hops(self) -> int:
        """Return the number of transfers in a row in a ring."""
        return 2 * (self.nodes - 1)

    @property
    def sent(self) -> float:
        """Return the bytes that each node sends in a ring."""
        return self.size * self.hops / self.nodes


@dataclass(frozen=True)
class RingCost:
    """What an all-reduce over gRPC costs.

    Attributes:
        hop_seconds: Time of an empty transfer without latency.
        hop_latencies: Latencies of the network in a transfer. It is about 2 because the receiver requests the data.
        seconds_per_byte: Processor time per byte sent that is not hidden by the network, such as copies.
        pipelined_seconds_per_byte: Processor time per byte sent while the network is busy, or else not at all.
        link_share: Share of the bandwidth that carries data of the tensor.
    """

    hop_seconds: float
    hop_latencies: float
    seconds_per_byte: float
    pipelined_seconds_per_byte: float
    link_share: float

    def seconds(self, operation: AllReduce) -> float:
        """Return the predicted time of an all-reduce."""
        busy = operation.nodes_per_core
        per_byte = max(self.pipelined_seconds_per_byte * busy, 8 / (operation.bits_per_second * self.link_share))
        hop = self.hop_seconds + self.hop_latencies * operation.latency_seconds
        return operation.hops * hop + operation.sent * (self.seconds_per_byte * busy + per_byte)


def fit_ring_cost(measurements: Sequence[tuple[AllReduce, float]]) -> RingCost:
    """Fit the parameters to measured times, by least squares of the logarithms of their ratios.

    Args:
        measurements: Operations and their seconds. They must differ in size, bandwidth and latency.
    """
    from scipy.optimize import least_squares

    def ratios(parameters: npt.NDArray[np.float64]) -> list[float]:
        cost = RingCost(*(parameters * TYPICAL))
        return [math.log(cost.seconds(operation) / seconds) for operation, seconds in measurements]

    upper = [np.inf] * 4 + [1 / TYPICAL[-1]]
    fitted = least_squares(ratios, np.ones(len(TYPICAL)), bounds=([1e-6] * len(TYPICAL), upper), loss="soft_l1")
    return RingCost(*(float(value) for value in fitted.x * TYPICAL))


def relative_errors(cost: RingCost, measurements: Sequence[tuple[AllReduce, float]]) -> list[float]:
    """Return predicted minus measured seconds, divided by the measured ones."""
    return [cost.seconds(operation) / seconds - 1 for operation, seconds in measurements]


def step_seconds(compute_seconds: float, all_reduce_seconds: float, overlap: float = 0.0) -> float:
    """Return the time of a training step.

    Args:
        compute_seconds: Time of the step without the other nodes.
        all_reduce_seconds: Time of the all-reduce of the gradients alone.
        overlap: Share of the shorter of the two that is hidden behind the other, 0 to 1.
    """
    return compute_seconds + all_reduce_seconds - overlap * min(compute_seconds, all_reduce_seconds)


def measured_overlap(compute_seconds: float, all_reduce_seconds: float, seconds: float) -> float:
    """Return the overlap that explains a measured step, so that `step_seconds` returns it; negative if it is slower."""
    return (compute_seconds + all_reduce_seconds - seconds) / min(compute_seconds, all_reduce_seconds)


@dataclass(frozen=True)
class Cluster:
    """Nodes with GPUs.

    Attributes:
        nodes: Number of nodes.
        gpus: GPUs of each node.
        bits_per_second: Bandwidth of each node in each direction.
        link_share: Share of the bandwidth that carries gradients.
    """

    nodes: int
    gpus: int
    bits_per_second: float
    link_share: float


# Microseconds and bytes per second in NCCL's model of its own performance: baseLat, hwLat and busBw of A100 GPUs in
# src/graph/tuning.cc of NVIDIA/nccl (commit 01afd20), for the protocol Simple, which NCCL uses for large tensors.
NCCL_RING_BASE, NCCL_RING_NVLINK, NCCL_RING_NETWORK, NCCL_RING_PLATEAU = 8.4, 3.4, 9.6, 1.9
NCCL_TREE_NVLINK, NCCL_TREE_NETWORK, NCCL_TREE_SHARE = 28.0, 50.0, 0.9
NVLINK_BYTES_PER_SECOND = 235e9


def nccl_seconds(size: float, cluster: Cluster) -> float:
    """Return the time of an all-reduce between all GPUs by the model of NCCL, with the faster of its algorithms.

    Args:
        size: Bytes of the tensor on each GPU.
        cluster: The nodes.
    """
    ranks = cluster.nodes * cluster.gpus
    if ranks == 1:
        return 0.0
    network = cluster.bits_per_second / 8 * cluster.link_share
    bandwidth = NVLINK_BYTES_PER_SECOND if cluster.nodes == 1 else min(network, NVLINK_BYTES_PER_SECOND)
    steps, network_steps = 2 * (ranks - 1), 2 * (cluster.nodes - 1)
    ring = (steps - network_steps) * NCCL_RING_NVLINK + network_steps * NCCL_RING_NETWORK
    if cluster.nodes > 1:
        ring *= NCCL_RING_PLATEAU
    tree = 2 * ((cluster.gpus - 1) * NCCL_TREE_NVLINK + math.log2(cluster.nodes) * NCCL_TREE_NETWORK)
    return min(
        (NCCL_RING_BASE + ring) * 1e-6 + size * steps / ranks / bandwidth,
        tree * 1e-6 + 2 * size / (NCCL_TREE_SHARE * bandwidth),
    )


@dataclass(frozen=True)
class Workload:
    """Training of all layers of a model on GPUs.

    Attributes:
        name: Name of the model.
        parameters: Trainable parameters.
        variables: Variables of the model.
        trainable_variables: Those that are trained.
        images_per_second: Images that a GPU trains on per second, in a node with all GPUs busy.
        batch_size: Images of a step on each GPU.
    """

    name: str
    parameters: int
    variables: int
    trainable_variables: int
    images_per_second: float
    batch_size: int

    @property
    def compute_seconds(self) -> float:
        """Return the time of a step without other nodes. It contains the all-reduce within the node."""
        return self.batch_size / self.images_per_second

    @property
    def gradient_bytes(self) -> int:
        """Return the bytes that the GPUs reduce in each step."""
        return self.parameters * GRADIENT_BYTES

    @property
    def created_variables(self) -> int:
        """Return the variables that are created in the scope: two more of each trained one by Adam, one by EMA."""
        return self.variables + 3 * self.trainable_variables

    @property
    def checkpoint_bytes(self) -> int:
        """Return the bytes of a checkpoint with Adam, EMA and the best weights."""
        return 5 * self.parameters * 4


def fit_variable_seconds(measurements: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Fit the time to create a variable in the scope, which is a broadcast along a tree of the nodes.

    Args:
        measurements: Numbers of nodes and seconds.

    Returns:
        Seconds without any transfer, and seconds of each level of the tree.
    """
    rows = [[1.0, math.ceil(math.log2(nodes))] for nodes, _ in measurements]
    start, level = np.linalg.lstsq(np.array(rows), np.array([seconds for _, seconds in measurements]), rcond=None)[0]
    return float(start), float(level)


def variable_seconds(fitted: tuple[float, float], nodes: int) -> float:
    """Return the time to create a variable on a number of nodes."""
    return fitted[0] + fitted[1] * math.ceil(math.log2(nodes))


def download_seconds(size: float, nodes: int, node_rate: float, storage_rate: float) -> float:
    """Return the time in which every node downloads all data.

    Args:
        size: Bytes.
        nodes: Number of nodes.
        node_rate: Bandwidth of a node in bits per second.
        storage_rate: Bandwidth of the storage for all nodes together in bits per second.
    """
    return 8 * size / min(node_rate, storage_rate / nodes)


def efficiency(workload: Workload, cluster: Cluster, overlap: float = 0.0) -> float:
    """Return the images per second of a GPU in the cluster, as a share of those in a node alone, 0 to 1."""
    single = Cluster(1, cluster.gpus, cluster.bits_per_second, cluster.link_share)
    added = nccl_seconds(workload.gradient_bytes, cluster) - nccl_seconds(workload.gradient_bytes, single)
    return workload.compute_seconds / step_seconds(workload.compute_seconds, max(0.0, added), overlap)


def smallest_batch(workload: Workload, cluster: Cluster, target: float) -> int:
    """Return the images per GPU and step from which the efficiency is at least `target`, without overlap.

    The images per second are assumed not to depend on the batch size.
    """
    single = Cluster(1, cluster.gpus, cluster.bits_per_second, cluster.link_share)
    added = nccl_seconds(workload.gradient_bytes, cluster) - nccl_seconds(workload.gradient_bytes, single)
    return max(1, math.ceil(added * target / (1 - target) * workload.images_per_second))


# Images per second. ResNet50: NVIDIA/DeepLearningExamples, TensorFlow/Classification/ConvNets/resnet50v1.5: 17,400 on
# a DGX A100 with 8 GPUs, mixed precision and XLA. The others: huggingface/pytorch-image-models, results/
# benchmark-train-amp-nhwc-pt112-cu113-rtx3090.csv, times the ratio of both sources for ResNet50: 2,175 / 1,218.01.
_RATIO = 17400 / 8 / 1218.01
WORKLOADS = (
    Workload("ResNet50, 224 px", 25_530_472, 320, 108, 17400 / 8, 256),
    Workload("EfficientNetV2L, 384 px", 118_002_696, 1403, 463, 97.56 * _RATIO, 32),
    Workload("ViT-B/16, 224 px", 86_570_000, 152, 152, 392.99 * _RATIO, 192),
)
