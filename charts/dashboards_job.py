"""The dashboard *Job*: one run, from its first stage to its model."""

from dashboards_parts import (
    GREEN,
    ORANGE,
    RED,
    STATES,
    YELLOW,
    Query,
    bars,
    chosen,
    lines,
    mapping,
    numbers,
    row,
    start,
    timeline,
)
from grafana_foundation_sdk.builders import dashboard

IN = 'namespace=~"$namespace", transferjob=~"$transferjob"'
RUN = f'{IN}, run="$run"'
PODS = 'namespace=~"$namespace", pod=~"$run(-pull)?-[a-z0-9]{5}"'
JOB = 'namespace=~"$namespace", job_name="$run"'

STAGE = {"0": ("ended", GREEN), "1": ("running", "blue")}
PHASES = {"1": ("Pending", YELLOW), "2": ("Running", "blue"), "3": ("Succeeded", GREEN), "4": ("Failed", RED)}

# `or` and not `max`: what holds now goes before what was seen last, and what was seen last to wait or run has ended.
STATE = (
    f"max(topwork:run_state{{{RUN}}}) or max(last_over_time(topwork:run_state{{{RUN}}}[$__range]) > 2) "
    f"or 0 * max(last_over_time(topwork:run_state{{{RUN}}}[$__range]))"
)
ELAPSED = (
    f"sum(max by (stage) (last_over_time(topwork_stage_duration_seconds{{{RUN}}}[$__range])) or "
    f"(time() - max by (stage) (topwork_stage_start_timestamp_seconds{{{RUN}}} and on (run, stage) "
    f"topwork_stage_running{{{RUN}}} == 1)))"
)


def job_dashboard() -> dashboard.Dashboard:
    """One run in full."""
    board = start("topwork / Job", "topwork-job", "One run: its stages, loss, speed, storage, GPUs and pods.")
    board = (
        board.with_variable(chosen("namespace", "Namespace", "", several=True))
        .with_variable(chosen("transferjob", "Job", 'namespace=~"$namespace"', several=True))
        .with_variable(chosen("run", "Run", IN, several=False))
    )
    for add in (_with_overview, _with_training, _with_speed, _with_storage, _with_gpus, _with_pods):
        board = add(board)
    return board


def seen_last(series: str, by: str) -> str:
    """What a series said last within the range, over all processes of the run: later ones repeat the earlier."""
    return f"max by ({by}) (last_over_time({series}{{{RUN}}}[$__range]))"


def _with_overview(board: dashboard.Dashboard) -> dashboard.Dashboard:
    state = numbers("State", "What the run does, or how it has ended.", Query(STATE, "state"), unit="none", span=4)
    idle = f"max(last_over_time((time() - topwork_last_progress_timestamp_seconds{{{RUN}}})[$__range:15s]))"
    rejected = f"sum({seen_last('topwork_images_rejected_total', 'reason')})"
    firing = f'count(ALERTS{{alertname=~"Topwork.+", alertstate="firing", {RUN}}}) or vector(0)'
    return (
        board.with_row(row("Run"))
        .with_panel(state.mappings([mapping(STATES)]))
        .with_panel(
            numbers(
                "Best metric",
                "Metric of the epoch whose weights are kept, of the last stage that has trained.",
                Query(
                    f"max by (name, split) (last_over_time(topwork:run_best_metric{{{RUN}}}[$__range]))",
                    "{{name}}, {{split}}",
                ),
                unit="none",
                span=4,
                decimals=4,
            )
        )
        .with_panel(numbers("Time in stages", "Wall time of all stages so far.", Query(ELAPSED, "time"), unit="s"))
        .with_panel(
            numbers(
                "Since last progress",
                "Time since a step, an image, a file or a checkpoint was finished, as of the last scrape. An alert "
                "fires after 15 minutes.",
                Query(idle, "idle"),
                unit="s",
                steps=[(None, GREEN), (300, YELLOW), (900, RED)],
            )
        )
        .with_panel(
            numbers(
                "Images in the dataset",
                "Images that the stored dataset holds, and how many were left out.",
                Query(f"max(last_over_time(topwork_dataset_images{{{RUN}}}[$__range]))", "stored"),
                Query(rejected, "rejected"),
                unit="short",
                span=4,
            )
        )
        .with_panel(
            numbers(
                "Gates not met",
                "Gates of spec.evaluate.gates that the model misses; known once it is evaluated.",
                Query(f"max(last_over_time(topwork_gates_failed{{{RUN}}}[$__range]))", "gates"),
                unit="none",
                steps=[(None, GREEN), (1, RED)],
            )
        )
        .with_panel(
            numbers(
                "Alerts",
                "Alerts on this run that fire now.",
                Query(firing, "alerts"),
                unit="none",
                steps=[(None, GREEN), (1, ORANGE)],
            )
        )
    )


def _with_training(board: dashboard.Dashboard) -> dashboard.Dashboard:
    epochs = f"{seen_last('topwork_epoch', 'stage')} / on (stage) ({seen_last('topwork_epochs_planned', 'stage')} > 0)"
    return (
        board.with_row(row("Training"))
        .with_panel(
            timeline(
                "Stages",
                "When which stage ran. Later processes repeat what earlier ones did.",
                Query(f"max by (stage) (topwork_stage_running{{{RUN}}})", "{{stage}}"),
                states=STAGE,
                span=12,
            )
        )
        .with_panel(
            bars(
                "Time of stages",
                "Wall time of each stage that has ended.",
                Query(seen_last("topwork_stage_duration_seconds", "stage"), "{{stage}}"),
                unit="s",
                span=6,
            )
        )
        .with_panel(
            bars(
                "Epochs",
                "Epochs that are complete, of those planned at most; early stopping may leave some out.",
                Query(epochs, "{{stage}}"),
                unit="percentunit",
                span=6,
                most=1,
            )
        )
        .with_panel(
            lines(
                "Loss",
                "Loss of the last epoch on the training and the validation split, and of the evaluation on the test "
                "split. Validation that rises while training falls is overfitting.",
                Query(f"max by (split) (topwork_loss{{{RUN}}})", "{{split}}"),
                unit="none",
                least=None,
            )
        )
        .with_panel(
            lines(
                "Metrics",
                "Metrics of the last epoch, and of the evaluation on the test split.",
                Query(f"max by (name, split) (topwork_metric{{{RUN}}})", "{{name}}, {{split}}"),
                unit="none",
                least=None,
            )
        )
        .with_panel(
            lines(
                "Learning rate",
                "Learning rate of the last step.",
                Query(f"max(topwork_learning_rate{{{RUN}}})", "learning rate"),
                unit="sci",
                least=None,
            )
        )
    )


def _with_speed(board: dashboard.Dashboard) -> dashboard.Dashboard:
    buckets = f"sum by (le) (rate(topwork_step_duration_seconds_bucket{{{RUN}}}[$__rate_interval]))"
    return (
        board.with_row(row("Speed"))
        .with_panel(
            lines(
                "Images a second",
                "Training images a second, over all replicas.",
                Query(f"sum(rate(topwork_images_total{{{RUN}}}[$__rate_interval]))", "images"),
                unit="short",
            )
        )
        .with_panel(
            lines(
                "Time of a step",
                "Wall time of training steps, waiting for input included: half, nine in ten and 99 in a hundred were "
                "faster. Interpolated within the buckets of a histogram.",
                *(
                    Query(f"histogram_quantile({share}, {buckets})", f"p{percent}")
                    for share, percent in (("0.5", 50), ("0.9", 90), ("0.99", 99))
                ),
                unit="s",
            )
        )
        .with_panel(
            lines(
                "Input wait",
                "Share of training time in which it waited for its next batch, over five minutes. Above a third the "
                "input holds GPUs up, and an alert fires.",
                Query(f"max(topwork:run_input_wait:ratio_rate5m{{{RUN}}})", "waiting"),
                unit="percentunit",
                most=1,
                steps=[(None, GREEN), (0.3333, RED)],
            )
        )
    )


def _with_storage(board: dashboard.Dashboard) -> dashboard.Dashboard:
    age = f"time() - max(topwork_checkpoint_last_success_timestamp_seconds{{{RUN}}} > 0)"
    return (
        board.with_row(row("Storage"))
        .with_panel(
            lines(
                "Age of the last checkpoint",
                "What a lost pod would cost: the time since a checkpoint was stored. An alert fires after an hour.",
                Query(age, "age"),
                unit="s",
                steps=[(None, GREEN), (3600, RED)],
                span=6,
            )
        )
        .with_panel(
            lines(
                "Storage traffic",
                "Bytes a second from and to object storage.",
                Query(
                    f"sum by (direction) (rate(topwork_storage_bytes_total{{{RUN}}}[$__rate_interval]))",
                    "{{direction}}",
                ),
                unit="Bps",
                span=6,
            )
        )
        .with_panel(
            lines(
                "Storage retries",
                "Requests to object storage that were tried again, in five minutes.",
                Query(f"sum(increase(topwork_storage_retries_total{{{RUN}}}[5m]))", "retries"),
                unit="short",
                steps=[(None, GREEN), (10, RED)],
                span=6,
            )
        )
        .with_panel(
            bars(
                "Rejected images",
                "Images that the dataset was stored without, by reason.",
                Query(seen_last("topwork_images_rejected_total", "reason"), "{{reason}}"),
                unit="short",
                steps=[(None, GREEN), (1, ORANGE)],
                span=6,
            )
        )
    )


def _with_gpus(board: dashboard.Dashboard) -> dashboard.Dashboard:
    def both(title: str, description: str, nvml: str, dcgm: str, unit: str) -> None:
        board.with_panel(
            lines(
                title,
                f"{description} As the run's own process reads it (NVML), and as the node's exporter does (DCGM), "
                "which goes on between two processes.",
                Query(f"max by (gpu) ({nvml}{{{RUN}}})", "GPU {{gpu}}, NVML"),
                Query(f"max by (pod, gpu) ({dcgm}{{{RUN}}})", "GPU {{gpu}} of {{pod}}, DCGM"),
                unit=unit,
                most=1 if unit == "percentunit" else None,
                span=6,
                steps=[(None, RED), (0.05, GREEN)] if unit == "percentunit" else [(None, GREEN)],
            )
        )

    board.with_row(row("GPUs"))
    both(
        "GPU utilisation",
        "Share of time in which a kernel ran.",
        "topwork_gpu_utilization_ratio",
        "topwork:dcgm_gpu_utilization:ratio",
        "percentunit",
    )
    both("GPU memory", "Memory in use.", "topwork_gpu_memory_used_bytes", "topwork:dcgm_gpu_memory_used:bytes", "bytes")
    both("GPU power", "Power draw.", "topwork_gpu_power_watts", "topwork:dcgm_gpu_power:watts", "watt")
    return board.with_panel(
        lines(
            "GPU temperature",
            "Temperature of the chip (NVML). GPUs slow down near 90 °C.",
            Query(f"max by (gpu) (topwork_gpu_temperature_celsius{{{RUN}}})", "GPU {{gpu}}"),
            unit="celsius",
            span=6,
            steps=[(None, GREEN), (87, RED)],
        )
    )


def _with_pods(board: dashboard.Dashboard) -> dashboard.Dashboard:
    phases = " + on (namespace, pod) ".join(
        f'{number} * max by (namespace, pod) (kube_pod_status_phase{{{PODS}, phase="{name}"}})'
        for number, (name, _) in PHASES.items()
    )
    pods = f"count(count by (namespace, pod) (last_over_time(kube_pod_status_phase{{{PODS}}}[$__range])))"
    restarts = (
        "sum(max by (namespace, pod, container) "
        f"(last_over_time(kube_pod_container_status_restarts_total{{{PODS}}}[$__range])))"
    )
    waited = (
        f"min(min_over_time(topwork_stage_start_timestamp_seconds{{{RUN}}}[$__range])) - "
        f"min(last_over_time(kube_job_status_start_time{{{JOB}}}[$__range]))"
    )
    return (
        board.with_row(row("Pods"))
        .with_panel(
            timeline(
                "Pods",
                "Phase of each pod of the run, by kube-state-metrics. A pod is Pending while pull and transfer run in "
                "its init containers, too.",
                Query(phases, "{{pod}}"),
                states=PHASES,
                span=12,
                height=4,
            )
        )
        .with_panel(
            numbers(
                "Pods and restarts",
                "Pods that worked for this run: more than one where it was stopped or failed and tried again. Their "
                "containers restart only where the node does it.",
                Query(pods, "pods"),
                Query(restarts, "restarts"),
                unit="none",
                span=4,
            )
        )
        .with_panel(
            numbers(
                "GPUs held",
                "GPUs that the pods of the run hold, idle or not.",
                Query(f"max(last_over_time(topwork:run_gpus{{{RUN}}}[$__range]))", "GPUs"),
                unit="none",
                span=4,
            )
        )
        .with_panel(
            numbers(
                "Waited to start",
                "From the start of the Job to that of its first stage: a free node, the image, the volumes.",
                Query(waited, "waited"),
                unit="s",
                span=4,
                steps=[(None, GREEN), (600, YELLOW), (3600, ORANGE)],
            )
        )
    )
