"""Figures of the visible GPUs, read through NVML when Prometheus asks; absent where there is no GPU."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

Reading = Callable[[Any, Any], float]

# Name, meaning and how NVML tells it, each in the base unit of its name.
# https://docs.nvidia.com/deploy/nvml-api/group__nvmlDeviceQueries.html
READINGS: dict[str, tuple[str, Reading]] = {
    "topwork_gpu_utilization_ratio": (
        "Share of the last sample period in which a kernel ran, 0..1.",
        lambda nvml, gpu: nvml.nvmlDeviceGetUtilizationRates(gpu).gpu / 100,
    ),
    "topwork_gpu_memory_used_bytes": (
        "Memory in use, by any process.",
        lambda nvml, gpu: nvml.nvmlDeviceGetMemoryInfo(gpu).used,
    ),
    "topwork_gpu_memory_total_bytes": (
        "Memory of the GPU.",
        lambda nvml, gpu: nvml.nvmlDeviceGetMemoryInfo(gpu).total,
    ),
    "topwork_gpu_power_watts": (
        "Power draw.",
        lambda nvml, gpu: nvml.nvmlDeviceGetPowerUsage(gpu) / 1000,
    ),
    "topwork_gpu_temperature_celsius": (
        "Temperature of the chip.",
        lambda nvml, gpu: nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU),
    ),
}


class Gpus(Collector):
    """One series a GPU and reading; a reading that a GPU does not have is left out.

    Args:
        nvml: The module `pynvml`, initialised.
        only: Indices or beginnings of UUIDs, as CUDA_VISIBLE_DEVICES has them: CUDA heeds it, NVML does not. None for
            all GPUs.
    """

    def __init__(self, nvml: Any, only: str | None = None) -> None:
        self._nvml, self._only = nvml, only

    @property
    def count(self) -> int:
        """GPUs that are there and meant; 0 where the driver does not say."""
        return len(self._meant())

    def _meant(self) -> list[int]:
        try:
            found = list(range(self._nvml.nvmlDeviceGetCount()))
            return found if self._only is None else [index for index in found if self._is_named(index)]
        except self._nvml.NVMLError:
            return []

    def _is_named(self, index: int) -> bool:
        names = [name.strip() for name in (self._only or "").split(",")]
        if str(index) in names:
            return True
        uuids = [name for name in names if name.startswith(("GPU-", "MIG-"))]
        return bool(uuids) and self._nvml.nvmlDeviceGetUUID(self._nvml.nvmlDeviceGetHandleByIndex(index)).startswith(
            tuple(uuids)
        )

    def describe(self) -> Iterator[GaugeMetricFamily]:
        """Name the families without asking the GPUs."""
        for name, (meaning, _) in READINGS.items():
            yield _family(name, meaning)

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Ask every GPU."""
        gpus = self._meant()
        for name, (meaning, read) in READINGS.items():
            family = _family(name, meaning)
            for index in gpus:
                # A GPU that has fallen off the bus, or a slice that tells no power, must not cost the whole page.
                with suppress(self._nvml.NVMLError):
                    family.add_metric([str(index)], read(self._nvml, self._nvml.nvmlDeviceGetHandleByIndex(index)))
            yield family


def _family(name: str, meaning: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, meaning, labels=["gpu"], unit=name.rsplit("_", 1)[1])


def visible_gpus(only: str | None = None) -> Gpus | None:
    """Open NVML.

    Args:
        only: The GPUs that are meant, as CUDA_VISIBLE_DEVICES names them; None for all.

    Returns:
        Their figures; None without NVML's library, its driver or a GPU.
    """
    try:
        import pynvml

        pynvml.nvmlInit()
    except ImportError:
        return None
    except pynvml.NVMLError:
        return None
    gpus = Gpus(pynvml, only)
    return gpus if gpus.count else None
