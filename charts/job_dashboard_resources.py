"""Rows of the *Job* dashboard about throughput, storage and GPUs."""

from grafana_foundation_sdk.builders import timeseries
from panels import (
    GREEN,
    GREEN_ONLY,
    ORANGE,
    RED,
    Panels,
    Query,
    bar_gauge,
    last_value,
    name_node,
    time_series,
)

RUN = 'namespace=~"$namespace", transferjob=~"$transferjob", run="$run"'


def throughput_panels() -> Panels:
    """Throughput, step time and input wait."""
    buckets = f"sum by (le) (rate(topwork_step_duration_seconds_bucket{{{RUN}}}[$__rate_interval]))"
    return [
        time_series(
            "Images per second",
            "Training images per second, over all replicas.",
            Query(f"sum(rate(topwork_images_total{{{RUN}}}[$__rate_interval]))", "images"),
            unit="short",
        ),
        time_series(
            "Step time",
            "Wall time of training steps, including input wait: 50th, 90th and 99th percentile, interpolated from "
            "histogram buckets.",
            *(
                Query(f"histogram_quantile({quantile}, {buckets})", f"p{percent}")
                for quantile, percent in (("0.5", 50), ("0.9", 90), ("0.99", 99))
            ),
            unit="s",
        ),
        time_series(
            "Input wait",
            "Share of training time spent waiting for the next batch, over five minutes, on the node that waits "
            "longest. Above a third, training is input-bound, and an alert fires if GPUs are allocated to the run.",
            Query(f"max(topwork:run_input_wait:ratio_rate5m{{{RUN}}})", "waiting"),
            unit="percentunit",
            maximum=1,
            steps=[(None, GREEN), (0.3333, RED)],
        ),
    ]


def storage_panels() -> Panels:
    """Checkpoints, storage traffic and rejected images."""
    age = f"time() - max(topwork_checkpoint_last_success_timestamp_seconds{{{RUN}}} > 0)"
    return [
        time_series(
            "Last checkpoint age",
            "Time since the last checkpoint was stored, which is the work lost if the pod is deleted. An alert fires "
            "after an hour.",
            Query(age, "age"),
            unit="s",
            steps=[(None, GREEN), (3600, RED)],
            span=6,
        ),
        time_series(
            "Storage traffic",
            "Bytes per second from and to object storage.",
            Query(
                f"sum by (direction) (rate(topwork_storage_bytes_total{{{RUN}}}[$__rate_interval]))",
                "{{direction}}",
            ),
            unit="Bps",
            span=6,
        ),
        time_series(
            "Storage retries",
            "Retried requests to object storage, over five minutes.",
            Query(f"sum(increase(topwork_storage_retries_total{{{RUN}}}[5m]))", "retries"),
            unit="short",
            steps=[(None, GREEN), (10, RED)],
            span=6,
        ),
        bar_gauge(
            "Rejected images",
            "Images excluded from the stored dataset, by reason.",
            Query(last_value("topwork_images_rejected_total", "reason", RUN), "{{reason}}"),
            unit="short",
            steps=[(None, GREEN), (1, ORANGE)],
            span=6,
        ),
    ]


def gpu_panels() -> Panels:
    """GPU utilization, memory, power and temperature, from NVML and DCGM."""
    return [
        _nvml_and_dcgm(
            "GPU utilization",
            "Share of time during which a kernel was running.",
            "topwork_gpu_utilization_ratio",
            "topwork:dcgm_gpu_utilization:ratio",
            "percentunit",
        ),
        _nvml_and_dcgm(
            "GPU memory",
            "GPU memory in use.",
            "topwork_gpu_memory_used_bytes",
            "topwork:dcgm_gpu_memory_used:bytes",
            "bytes",
        ),
        _nvml_and_dcgm("GPU power", "Power draw.", "topwork_gpu_power_watts", "topwork:dcgm_gpu_power:watts", "watt"),
        time_series(
            "GPU temperature",
            "Temperature of the GPU (NVML). GPUs throttle near 90 °C.",
            Query(
                name_node(f"max by (node, gpu) (topwork_gpu_temperature_celsius{{{RUN}}})"), "GPU {{gpu}}{{of_node}}"
            ),
            unit="celsius",
            span=6,
            steps=[(None, GREEN), (87, RED)],
        ),
    ]


def _nvml_and_dcgm(title: str, description: str, nvml: str, dcgm: str, unit: str) -> timeseries.Panel:
    """Create a panel with both sources, so that it has data if one of them is missing."""
    share = unit == "percentunit"
    return time_series(
        title,
        f"{description} Sources: the process of the run (NVML) and the exporter on the node (DCGM), which also covers "
        "the time between two processes.",
        Query(name_node(f"max by (node, gpu) ({nvml}{{{RUN}}})"), "GPU {{gpu}}{{of_node}}, NVML"),
        Query(f"max by (pod, gpu) ({dcgm}{{{RUN}}})", "GPU {{gpu}} of {{pod}}, DCGM"),
        unit=unit,
        maximum=1 if share else None,
        span=6,
        steps=[(None, RED), (0.05, GREEN)] if share else GREEN_ONLY,
    )
