"""Device placement: the distribution strategy of the process, the replicas of a pod, and the dtype policy."""

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog
import tensorflow as tf

from topwork.errors import SettingError, TopworkError, UnavailableError, quote_error
from topwork.nodes.group import NodeGroup
from topwork.training.distribution.collective_runtime import responsive_start

log = structlog.get_logger(__name__)

# NVIDIA Ampere: the first GPUs that support bfloat16.
BFLOAT16_COMPUTE_CAPABILITY = (8, 0)
# Multiplications per image in a forward pass, above which bfloat16 pays off on a CPU. Measured on two cores with AMX,
# relative to float32: a training step of Xception at 150 pixels (2e9) takes 0.69 of the time, of ResNet50 at 224 (4e9)
# 0.53; one of MobileNetV2 at 96 (6e7) takes longer.
MIN_MULTIPLICATIONS_FOR_BFLOAT16 = 1e9


@dataclass
class _ProcessStrategy:
    """The strategy of this process. A second strategy with more or fewer replicas would abort its collectives."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    replicas: int | None = None
    strategy: Any = None


_process = _ProcessStrategy()


def get_strategy(replicas: int | None, nodes: NodeGroup | None = None) -> tf.distribute.Strategy:
    """Return the distribution strategy of this process; the first call creates it.

    With several nodes, all of them must call this at the same time: they connect to each other.

    Args:
        replicas: Number of replicas on this node; None uses one per visible GPU, or one on the CPU.
        nodes: The nodes that train the run; None for this one only.

    Returns:
        MultiWorkerMirroredStrategy for several nodes, MirroredStrategy for several replicas on one node, otherwise
        TensorFlow's default strategy.

    Raises:
        SettingError: If there are fewer GPUs, if this process has a strategy with a different number of replicas, or if
            TensorFlow was initialized before the replicas could be configured.
        UnavailableError: If the nodes have different numbers of GPUs, or another node failed meanwhile.
        Stopped: If another node was stopped meanwhile.

    Example:
        `with get_strategy(None).scope(): model = build_model()`
    """
    with _process.lock:
        gpus = tf.config.list_physical_devices("GPU")
        count = replicas or max(1, len(gpus))
        if _process.strategy is None:
            _process.strategy = _create_strategy(count, gpus, nodes or NodeGroup())
            _process.replicas = count
        if _process.replicas != count:
            raise SettingError(
                f"This process trains on {_process.replicas} replicas and cannot also train on {count}: TensorFlow "
                "supports one strategy per process. Start another process."
            )
        return _process.strategy


def choose_pod_replicas(gpus: int, visible_devices: str | None = None) -> int | None:
    """Choose the replicas of a container of the Job by the GPUs that it has, which may differ from its spec.

    Args:
        gpus: `spec.compute.gpus`.
        visible_devices: CUDA_VISIBLE_DEVICES; None if it is not set.

    Returns:
        The argument of `get_strategy`: number of replicas on the CPU, or None for one per visible GPU, or one on the
        CPU.

    Raises:
        SettingError: If the spec requests GPUs, but the environment of the container hides all of them.
        UnavailableError: If the spec requests GPUs and TensorFlow supports them, but detects none. This depends on the
            node: its driver, device plugin and hardware.
    """
    visible = len(tf.config.list_physical_devices("GPU"))
    if visible or not gpus:
        if visible != gpus:
            log.warning("GPU count differs from spec", requested=gpus, visible=visible)
        return None
    if tf.test.is_built_with_cuda():
        raise _no_gpu_error(gpus, visible_devices)
    log.warning(
        "using CPU replicas instead of GPUs", replicas=gpus, reason="this build of TensorFlow does not support CUDA"
    )
    return gpus


def _no_gpu_error(gpus: int, visible_devices: str | None) -> TopworkError:
    problem = f"spec.compute.gpus requests {gpus} GPU{'s' * (gpus != 1)}, but TensorFlow detects none."
    # CUDA ignores all devices from the first invalid index on.
    if visible_devices is not None and visible_devices.partition(",")[0].strip() in {"", "-1", "none", "void"}:
        return SettingError(
            f"{problem} The environment of the container hides all GPUs: CUDA_VISIBLE_DEVICES is {visible_devices!r}. "
            "Remove the variable from the image or from the Secret."
        )
    return UnavailableError(
        f"{problem} Another node may have them. If this happens again, check the node's driver (nvidia-smi), its "
        "device plugin (kubectl describe node: is nvidia.com/gpu allocatable?), the RuntimeClass (nvidia, if it is not "
        "the node's default) and the image: its TensorFlow requires CUDA "
        f"{tf.sysconfig.get_build_info().get('cuda_version', '(bundled)')} and a driver that supports it."
    )


def _create_strategy(count: int, gpus: list[Any], nodes: NodeGroup) -> tf.distribute.Strategy:
    if gpus and count > len(gpus):
        raise SettingError(f"--replicas {count} is more than the {len(gpus)} visible GPUs.")
    try:
        for gpu in gpus:
            # Otherwise the first process allocates all of the memory.
            tf.config.experimental.set_memory_growth(gpu, True)
        if not gpus and count > 1:
            cpu = tf.config.list_physical_devices("CPU")[0]
            tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * count)
    except RuntimeError as error:
        raise SettingError(
            f"TensorFlow was initialized before {count} replicas could be configured. Start another process."
        ) from error
    if nodes.count > 1:
        return _connect_nodes(count, gpus, nodes)
    if count == 1:
        return tf.distribute.get_strategy()
    device = "GPU" if gpus else "CPU"
    return tf.distribute.MirroredStrategy([f"/{device}:{index}" for index in range(count)])


def _connect_nodes(count: int, gpus: list[Any], nodes: NodeGroup) -> tf.distribute.Strategy:
    """Create the strategy of several nodes. TensorFlow waits for all of them, without a time limit."""
    _require_equal_replicas(nodes.gather(count))
    if gpus and count < len(gpus):
        tf.config.set_visible_devices(gpus[:count], "GPU")
    distribute = tf.distribute
    implementation = distribute.experimental.CommunicationImplementation
    with _report_failed_start(nodes), responsive_start(), nodes.blocking():
        strategy = distribute.MultiWorkerMirroredStrategy(
            cluster_resolver=distribute.cluster_resolver.SimpleClusterResolver(
                tf.train.ClusterSpec({"worker": list(nodes.node.addresses)}),
                task_type="worker",
                task_id=nodes.index,
                num_accelerators={"GPU": count} if gpus else {},
                rpc_layer="grpc",
            ),
            communication_options=distribute.experimental.CommunicationOptions(
                implementation=implementation.NCCL if gpus else implementation.RING
            ),
        )
    log.info("nodes connected", node=nodes.index, nodes=nodes.count, replicas=strategy.num_replicas_in_sync)
    return strategy


@contextmanager
def _report_failed_start(nodes: NodeGroup) -> Iterator[None]:
    try:
        yield
    except tf.errors.OpError as error:
        raise nodes.peer_failure() or UnavailableError(
            f"TensorFlow could not connect node {nodes.index} at {nodes.node.addresses[nodes.index]} to the others: "
            f"{quote_error(error)}. Another process may use its port, or the nodes cannot reach each other."
        ) from error


def _require_equal_replicas(counts: list[int]) -> None:
    if len(set(counts)) > 1:
        found = ", ".join(f"node {index} has {count}" for index, count in enumerate(counts))
        raise UnavailableError(
            f"All nodes must have the same number of GPUs, but {found}. Check that each pod gets the GPUs of "
            "spec.compute.gpus, and that its node's driver detects them (nvidia-smi)."
        )


def choose_dtype_policy(precision: str, multiplications: float) -> str:
    """Choose the Keras dtype policy.

    Args:
        precision: `spec.compute.precision`. auto chooses mixed_bfloat16 on GPUs that support it, and on CPUs that
            support it if the model is large enough; otherwise float32.
        multiplications: Multiplications per image in the forward pass of a training step.

    Returns:
        Name of the dtype policy.
    """
    if precision != "auto":
        return precision
    gpus = tf.config.list_physical_devices("GPU")
    if not gpus:
        is_large = multiplications >= MIN_MULTIPLICATIONS_FOR_BFLOAT16
        return "mixed_bfloat16" if is_large and cpu_supports_bfloat16() else "float32"
    capabilities = (tf.config.experimental.get_device_details(gpu).get("compute_capability", (0, 0)) for gpu in gpus)
    return (
        "mixed_bfloat16" if all(capability >= BFLOAT16_COMPUTE_CAPABILITY for capability in capabilities) else "float32"
    )


def cpu_supports_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Return whether the CPU has bfloat16 instructions (AVX-512 BF16 or AMX), so that bfloat16 is faster than float32.

    Args:
        cpuinfo: File that describes the CPU on Linux; without it, the result is False.
    """
    try:
        return bool(re.search(r"^flags\b.*\b(avx512_bf16|amx_bf16)\b", cpuinfo.read_text(), re.MULTILINE))
    except OSError:
        return False


def jit_compile(replicas: int) -> bool | str:
    """Choose the `jit_compile` argument of `compile`: Keras decides on one GPU, otherwise XLA is off.

    XLA fails or hangs with several replicas (keras#20763). On CPUs it is 7 to 19 times slower with depthwise
    convolutions.
    """
    return "auto" if replicas == 1 and tf.config.list_physical_devices("GPU") else False
