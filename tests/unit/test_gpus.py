"""GPU metrics. NVML is faked, because it requires a GPU."""

from types import SimpleNamespace

import pytest
from prometheus_client import CollectorRegistry

from topwork.clients.prometheus.gpus import GpuCollector, open_gpu_collector


class NVMLError(Exception):
    pass


def fail(gpu):
    raise NVMLError


TWO_GPUS = SimpleNamespace(
    NVMLError=NVMLError,
    NVML_TEMPERATURE_GPU=0,
    nvmlDeviceGetCount=lambda: 2,
    nvmlDeviceGetHandleByIndex=lambda index: index,
    nvmlDeviceGetUtilizationRates=lambda gpu: SimpleNamespace(gpu=[97, 50][gpu], memory=10),
    nvmlDeviceGetMemoryInfo=lambda gpu: SimpleNamespace(used=2**30, total=2**34),
    nvmlDeviceGetPowerUsage=lambda gpu: 412_500 if gpu == 0 else fail(gpu),
    nvmlDeviceGetTemperature=lambda gpu, sensor: 61,
    nvmlDeviceGetUUID=lambda gpu: ["GPU-aaaa-1", "GPU-bbbb-2"][gpu],
)


def test_all_gpus_are_reported_in_base_units():
    registry = CollectorRegistry()
    registry.register(GpuCollector(TWO_GPUS))
    assert registry.get_sample_value("topwork_gpu_utilization_ratio", {"gpu": "0"}) == 0.97
    assert registry.get_sample_value("topwork_gpu_utilization_ratio", {"gpu": "1"}) == 0.5
    assert registry.get_sample_value("topwork_gpu_memory_used_bytes", {"gpu": "1"}) == 2**30
    assert registry.get_sample_value("topwork_gpu_memory_total_bytes", {"gpu": "1"}) == 2**34
    assert registry.get_sample_value("topwork_gpu_power_watts", {"gpu": "0"}) == 412.5
    assert registry.get_sample_value("topwork_gpu_temperature_celsius", {"gpu": "0"}) == 61


def test_metric_that_a_gpu_does_not_support_is_omitted():
    registry = CollectorRegistry()
    registry.register(GpuCollector(TWO_GPUS))
    assert registry.get_sample_value("topwork_gpu_power_watts", {"gpu": "1"}) is None


@pytest.mark.parametrize(
    ("visible_devices", "indices"),
    [(None, ["0", "1"]), ("1", ["1"]), ("1,0", ["0", "1"]), ("GPU-bbbb", ["1"]), ("-1", []), ("", []), ("2", [])],
)
def test_only_gpus_visible_to_cuda_are_reported(visible_devices, indices):
    gpus = GpuCollector(TWO_GPUS, visible_devices)
    assert [sample.labels["gpu"] for sample in next(iter(gpus.collect())).samples] == indices
    assert gpus.count == len(indices)


def test_driver_errors_do_not_fail_the_scrape():
    registry = CollectorRegistry()
    gpus = GpuCollector(SimpleNamespace(NVMLError=NVMLError, nvmlDeviceGetCount=lambda: fail(0)))
    registry.register(gpus)
    assert gpus.count == 0
    assert [family.samples for family in registry.collect()] == [[]] * 5
    failed_gpu = SimpleNamespace(**{**vars(TWO_GPUS), "nvmlDeviceGetHandleByIndex": lambda index: index or fail(index)})
    registry = CollectorRegistry()
    registry.register(GpuCollector(failed_gpu))
    assert registry.get_sample_value("topwork_gpu_utilization_ratio", {"gpu": "0"}) is None
    assert registry.get_sample_value("topwork_gpu_utilization_ratio", {"gpu": "1"}) == 0.5


def test_without_a_gpu_there_is_no_collector():
    gpus = open_gpu_collector()
    assert gpus is None or len(list(gpus.collect())) == 5
