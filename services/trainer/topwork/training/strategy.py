"""On which devices the model is trained, and in which number format."""

import re
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tensorflow as tf

from topwork.errors import SettingError, SpecError
from topwork.progress import Progress
from topwork.spec.training import Optimizer

# NVIDIA Ampere, the first GPUs that compute in bfloat16.
BFLOAT16_COMPUTE_CAPABILITY = (8, 0)
# Multiplications for one image, forward. Measured on two cores with AMX: a training step of Xception at 150 pixels
# (2e9) takes 0.69 of the time in float32, one of ResNet50 at 224 (4e9) 0.53, one of MobileNetV2 at 96 (6e7) more.
WORTH_BFLOAT16 = 1e9


@dataclass
class _Chosen:
    """The one strategy of this process: one of another size aborts the collectives of the first."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    replicas: int | None = None
    strategy: Any = None


_chosen = _Chosen()


def strategy(replicas: int | None) -> tf.distribute.Strategy:
    """Give the strategy of this process, made at the first call.

    Args:
        replicas: Replicas of the model; None is one on each visible GPU, or one on the processor.

    Returns:
        MirroredStrategy for several replicas, else TensorFlow's default strategy.

    Raises:
        SettingError: If there are fewer GPUs, if this process has a strategy of another size, or if TensorFlow has
            started before it could be told about the replicas.
    """
    with _chosen.lock:
        gpus = tf.config.list_physical_devices("GPU")
        count = replicas or max(1, len(gpus))
        if _chosen.strategy is None:
            _chosen.strategy = _make(count, gpus)
            _chosen.replicas = count
        if _chosen.replicas != count:
            raise SettingError(
                f"This process trains on {_chosen.replicas} replicas and can't train on {count} too: TensorFlow takes "
                "one strategy a process. Start another process."
            )
        return _chosen.strategy


def replicas_in_pod(asked: int, progress: Progress) -> int | None:
    """Choose the replicas of a container of the Job, by the GPUs that it has and not by those that its spec names.

    Args:
        asked: `spec.compute.gpus`.
        progress: Where it is said that there are others than asked for.

    Returns:
        What `strategy` takes: replicas on the processor; None is one on each visible GPU, or one on the processor.

    Raises:
        SettingError: If GPUs were asked for, TensorFlow could use them, and it sees none.
    """
    visible = len(tf.config.list_physical_devices("GPU"))
    if visible or not asked:
        if visible != asked:
            progress.note("other GPUs than asked for", asked=asked, visible=visible)
        return None
    if tf.test.is_built_with_cuda():
        raise SettingError(
            f"spec.compute.gpus asks for {_gpus(asked)}, and TensorFlow sees none here. Look at the node's driver "
            "(nvidia-smi), at its device plugin (kubectl describe node: is nvidia.com/gpu allocatable?), at the "
            "RuntimeClass (nvidia, where it isn't the node's default) and at the image: its TensorFlow wants CUDA "
            f"{tf.sysconfig.get_build_info().get('cuda_version', 'of its own')}, and a driver that has it."
        )
    progress.note("no GPU can be used by this build of TensorFlow: replicas on the processor", replicas=asked)
    return asked


def _gpus(count: int) -> str:
    return f"{count} GPU{'s' * (count != 1)}"


def _make(count: int, gpus: list[Any]) -> tf.distribute.Strategy:
    if gpus and count > len(gpus):
        raise SettingError(f"--replicas {count} asks for more than the {len(gpus)} GPUs that are visible here.")
    try:
        for gpu in gpus:
            # Otherwise the first process takes all of the memory.
            tf.config.experimental.set_memory_growth(gpu, True)
        if not gpus and count > 1:
            processor = tf.config.list_physical_devices("CPU")[0]
            tf.config.set_logical_device_configuration(processor, [tf.config.LogicalDeviceConfiguration()] * count)
    except RuntimeError as error:
        raise SettingError(
            f"TensorFlow has started before it was told to train on {count} replicas: start another process."
        ) from error
    if count == 1:
        return tf.distribute.get_strategy()
    kind = "GPU" if gpus else "CPU"
    return tf.distribute.MirroredStrategy([f"/{kind}:{index}" for index in range(count)])


def check_replicas(replicas: int, batch_size: int, optimizer: Optimizer) -> None:
    """Refuse what MirroredStrategy can't do with `fit`.

    Args:
        replicas: Replicas of the model.
        batch_size: Images a step over all replicas.
        optimizer: The optimizer's settings.

    Raises:
        SpecError: If the batch can't be divided, or the optimizer works on one replica only.
    """
    if replicas == 1:
        return
    if batch_size % replicas:
        fitting = batch_size - batch_size % replicas or replicas
        raise SpecError(
            f"batchSize {batch_size} can't be divided by the {replicas} replicas that train here. Use {fitting}."
        )
    reasons = {
        "gradientAccumulationSteps": (optimizer.gradient_accumulation_steps, "Keras crashes (keras#20582)"),
        "globalClipnorm": (optimizer.global_clipnorm, "each replica clips before the gradients are added up"),
    }
    for key, (value, reason) in reasons.items():
        if value is not None:
            raise SpecError(
                f"optimizer.{key} is {value}, but with {replicas} replicas {reason}. "
                "Take it out or train on one GPU (clipnorm and clipvalue work everywhere)."
            )


def policy(precision: str, work: float) -> str:
    """Choose the number format of the computation.

    Args:
        precision: `spec.compute.precision`; auto is mixed_bfloat16 on GPUs that have it, on processors that have it
            where the model is large enough to gain from it, else float32.
        work: Multiplications for one image in a step, forward.

    Returns:
        A Keras dtype policy.
    """
    if precision != "auto":
        return precision
    gpus = tf.config.list_physical_devices("GPU")
    if not gpus:
        return "mixed_bfloat16" if work >= WORTH_BFLOAT16 and processor_has_bfloat16() else "float32"
    capable = [
        tf.config.experimental.get_device_details(gpu).get("compute_capability", (0, 0)) >= BFLOAT16_COMPUTE_CAPABILITY
        for gpu in gpus
    ]
    return "mixed_bfloat16" if all(capable) else "float32"


def processor_has_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Say whether the processor multiplies in bfloat16, so that it takes less time than in float32.

    Args:
        cpuinfo: What Linux tells of the processor; on other systems the answer is no.
    """
    try:
        return bool(re.search(r"^flags\b.*\b(avx512_bf16|amx_bf16)\b", cpuinfo.read_text(), re.MULTILINE))
    except OSError:
        return False


def jit_compile(replicas: int) -> bool | str:
    """Say whether XLA compiles the step: Keras decides on one GPU.

    Under several replicas it fails or hangs (keras#20763); on processors it is 7 to 19 times slower with depthwise
    convolutions.
    """
    return "auto" if replicas == 1 and tf.config.list_physical_devices("GPU") else False
