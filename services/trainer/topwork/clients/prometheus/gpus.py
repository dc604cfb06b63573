"""Prometheus collector for GPU utilization, memory, power and temperature, read through NVML at scrape time."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

# Takes the NVML module and a device handle.
ReadFunction = Callable[[Any, Any], float]

# Metric name: (help text, function that reads the value in the base unit of the name).
# https://docs.nvidia.com/deploy/nvml-api/group__nvmlDeviceQueries.html
GPU_METRICS: dict[str, tuple[str, ReadFunction]] = {
    "topwork_gpu_utilization_ratio": (
        "Fraction of the last sample period during which a kernel was running, 0 to 1.",
        lambda nvml, gpu: nvml.nvmlDeviceGetUtilizationRates(gpu).gpu / 100,
    ),
    "topwork_gpu_memory_used_bytes": (
        "GPU memory in use by all processes.",
        lambda nvml, gpu: nvml.nvmlDeviceGetMemoryInfo(gpu).used,
    ),
    "topwork_gpu_memory_total_bytes": (
        "Total GPU memory.",
        lambda nvml, gpu: nvml.nvmlDeviceGetMemoryInfo(gpu).total,
    ),
    "topwork_gpu_power_watts": (
        "GPU power draw.",
        lambda nvml, gpu: nvml.nvmlDeviceGetPowerUsage(gpu) / 1000,
    ),
    "topwork_gpu_temperature_celsius": (
        "GPU temperature.",
        lambda nvml, gpu: nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU),
    ),
}


class GpuCollector(Collector):
    """Collects one series per GPU and metric. A metric that a GPU does not support is omitted.

    Args:
        nvml: The initialized `pynvml` module.
        visible_devices: Indices or UUID prefixes in the format of CUDA_VISIBLE_DEVICES, which NVML itself ignores.
            None selects all GPUs.
    """

    def __init__(self, nvml: Any, visible_devices: str | None = None) -> None:
        self._nvml, self._visible_devices = nvml, visible_devices

    @property
    def count(self) -> int:
        """Number of selected GPUs; 0 if the driver reports an error."""
        return len(self._selected_indices())

    @property
    def indices(self) -> list[int]:
        """Indices of the selected GPUs; empty if the driver reports an error."""
        return self._selected_indices()

    def _selected_indices(self) -> list[int]:
        try:
            indices = range(self._nvml.nvmlDeviceGetCount())
            return [index for index in indices if self._is_selected(index)]
        except self._nvml.NVMLError:
            return []

    def _is_selected(self, index: int) -> bool:
        if self._visible_devices is None:
            return True
        devices = [device.strip() for device in self._visible_devices.split(",")]
        if str(index) in devices:
            return True
        uuids = tuple(device for device in devices if device.startswith(("GPU-", "MIG-")))
        if not uuids:
            return False
        handle = self._nvml.nvmlDeviceGetHandleByIndex(index)
        return bool(self._nvml.nvmlDeviceGetUUID(handle).startswith(uuids))

    def describe(self) -> Iterator[GaugeMetricFamily]:
        """Yield the metric families without querying the GPUs."""
        for name, (help_text, _) in GPU_METRICS.items():
            yield _family(name, help_text)

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Query every selected GPU and yield the metric families with their samples."""
        indices = self._selected_indices()
        for name, (help_text, read) in GPU_METRICS.items():
            family = _family(name, help_text)
            for index in indices:
                # A failed GPU, or a MIG slice without a power sensor, must not fail the whole scrape.
                with suppress(self._nvml.NVMLError):
                    family.add_metric([str(index)], read(self._nvml, self._nvml.nvmlDeviceGetHandleByIndex(index)))
            yield family


def _family(name: str, help_text: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, help_text, labels=["gpu"], unit=name.rsplit("_", 1)[1])


def open_gpu_collector(visible_devices: str | None = None) -> GpuCollector | None:
    """Initialize NVML and create a collector.

    Args:
        visible_devices: GPUs to report, in the format of CUDA_VISIBLE_DEVICES; None reports all.

    Returns:
        The collector; None if the NVML library, the driver or a GPU is missing.
    """
    try:
        import pynvml

        pynvml.nvmlInit()
    except ImportError:
        return None
    except pynvml.NVMLError:
        return None
    collector = GpuCollector(pynvml, visible_devices)
    return collector if collector.count else None


def list_gpus(visible_devices: str | None = None) -> list[str]:
    """List the GPUs of this machine, without TensorFlow.

    Args:
        visible_devices: CUDA_VISIBLE_DEVICES; None selects all.

    Returns:
        What CUDA_VISIBLE_DEVICES names, if it is set and there are GPUs; otherwise the indices of all GPUs.
    """
    collector = open_gpu_collector(visible_devices)
    if collector is None:
        return []
    if visible_devices is None:
        return [str(index) for index in collector.indices]
    return [device.strip() for device in visible_devices.split(",")]
