"""The dashboard *Job*, its lower half: speed, storage and GPUs of a run."""

from dashboards_parts import CALM, GREEN, ORANGE, RED, Panels, Query, bars, lines, seen_last
from grafana_foundation_sdk.builders import timeseries

RUN = 'namespace=~"$namespace", transferjob=~"$transferjob", run="$run"'


def speed() -> Panels:
    """How fast it trains, and whether input holds it up."""
    buckets = f"sum by (le) (rate(topwork_step_duration_seconds_bucket{{{RUN}}}[$__rate_interval]))"
    return [
        lines(
            "Images a second",
            "Training images a second, over all replicas.",
            Query(f"sum(rate(topwork_images_total{{{RUN}}}[$__rate_interval]))", "images"),
            unit="short",
        ),
        lines(
            "Time of a step",
            "Wall time of training steps, waiting for input included: half, nine in ten and 99 in a hundred were "
            "faster. Interpolated within the buckets of a histogram.",
            *(
                Query(f"histogram_quantile({share}, {buckets})", f"p{percent}")
                for share, percent in (("0.5", 50), ("0.9", 90), ("0.99", 99))
            ),
            unit="s",
        ),
        lines(
            "Input wait",
            "Share of training time in which it waited for its next batch, over five minutes. Above a third the "
            "input holds GPUs up, and an alert fires.",
            Query(f"max(topwork:run_input_wait:ratio_rate5m{{{RUN}}})", "waiting"),
            unit="percentunit",
            most=1,
            steps=[(None, GREEN), (0.3333, RED)],
        ),
    ]


def storage() -> Panels:
    """What goes to and from object storage, and what was left out of the dataset."""
    age = f"time() - max(topwork_checkpoint_last_success_timestamp_seconds{{{RUN}}} > 0)"
    return [
        lines(
            "Age of the last checkpoint",
            "What a lost pod would cost: the time since a checkpoint was stored. An alert fires after an hour.",
            Query(age, "age"),
            unit="s",
            steps=[(None, GREEN), (3600, RED)],
            span=6,
        ),
        lines(
            "Storage traffic",
            "Bytes a second from and to object storage.",
            Query(
                f"sum by (direction) (rate(topwork_storage_bytes_total{{{RUN}}}[$__rate_interval]))",
                "{{direction}}",
            ),
            unit="Bps",
            span=6,
        ),
        lines(
            "Storage retries",
            "Requests to object storage that were tried again, in five minutes.",
            Query(f"sum(increase(topwork_storage_retries_total{{{RUN}}}[5m]))", "retries"),
            unit="short",
            steps=[(None, GREEN), (10, RED)],
            span=6,
        ),
        bars(
            "Rejected images",
            "Images that the dataset was stored without, by reason.",
            Query(seen_last("topwork_images_rejected_total", "reason", RUN), "{{reason}}"),
            unit="short",
            steps=[(None, GREEN), (1, ORANGE)],
            span=6,
        ),
    ]


def gpus() -> Panels:
    """What its GPUs do, by NVML and by DCGM."""
    return [
        _both(
            "GPU utilisation",
            "Share of time in which a kernel ran.",
            "topwork_gpu_utilization_ratio",
            "topwork:dcgm_gpu_utilization:ratio",
            "percentunit",
        ),
        _both(
            "GPU memory",
            "Memory in use.",
            "topwork_gpu_memory_used_bytes",
            "topwork:dcgm_gpu_memory_used:bytes",
            "bytes",
        ),
        _both("GPU power", "Power draw.", "topwork_gpu_power_watts", "topwork:dcgm_gpu_power:watts", "watt"),
        lines(
            "GPU temperature",
            "Temperature of the chip (NVML). GPUs slow down near 90 °C.",
            Query(f"max by (gpu) (topwork_gpu_temperature_celsius{{{RUN}}})", "GPU {{gpu}}"),
            unit="celsius",
            span=6,
            steps=[(None, GREEN), (87, RED)],
        ),
    ]


def _both(title: str, description: str, nvml: str, dcgm: str, unit: str) -> timeseries.Panel:
    """Draw what both say in one panel, so that it has data where one of them is missing."""
    share = unit == "percentunit"
    return lines(
        title,
        f"{description} As the run's own process reads it (NVML), and as the node's exporter does (DCGM), "
        "which goes on between two processes.",
        Query(f"max by (gpu) ({nvml}{{{RUN}}})", "GPU {{gpu}}, NVML"),
        Query(f"max by (pod, gpu) ({dcgm}{{{RUN}}})", "GPU {{gpu}} of {{pod}}, DCGM"),
        unit=unit,
        most=1 if share else None,
        span=6,
        steps=[(None, RED), (0.05, GREEN)] if share else CALM,
    )
