"""The *Job* dashboard: one run in detail."""

from grafana_foundation_sdk.builders import dashboard
from job_dashboard_nodes import node_panels
from job_dashboard_resources import gpu_panels, storage_panels, throughput_panels
from panels import (
    GREEN,
    ORANGE,
    RED,
    STATES,
    YELLOW,
    Panels,
    Query,
    add_rows,
    bar_gauge,
    create_dashboard,
    label_variable,
    last_value,
    stat_panel,
    state_timeline,
    time_series,
    value_mapping,
)

MATCHERS = 'namespace=~"$namespace", transferjob=~"$transferjob"'
RUN = f'{MATCHERS}, run="$run"'
PODS = 'namespace=~"$namespace", pod=~"$run(-pull|-[0-9]+)?-[a-z0-9]{5}"'
JOB = 'namespace=~"$namespace", job_name="$run"'

STAGE_STATES = {"0": ("ended", GREEN), "1": ("running", "blue")}
PHASES = {"1": ("Pending", YELLOW), "2": ("Running", "blue"), "3": ("Succeeded", GREEN), "4": ("Failed", RED)}

# `or`, not `max`: the current state takes precedence over the last known state. Runs without current state have ended:
# only an outcome (3 to 5) is still true.
STATE = (
    f"max(topwork:run_state{{{RUN}}}) or max(last_over_time(topwork:run_state{{{RUN}}}[$__range]) > 2 < 6) "
    f"or 0 * max(last_over_time(topwork:run_state{{{RUN}}}[$__range]))"
)
ELAPSED = (
    f"sum(max by (stage) (last_over_time(topwork_stage_duration_seconds{{{RUN}}}[$__range])) or "
    f"(time() - max by (stage) (topwork_stage_start_timestamp_seconds{{{RUN}}} and on (run, stage) "
    f"topwork_stage_running{{{RUN}}} == 1)))"
)


def build_job_dashboard() -> dashboard.Dashboard:
    """Build the dashboard of one run."""
    board = create_dashboard(
        "topwork / Job", "topwork-job", "One run: stages, loss, throughput, storage, GPUs and pods."
    )
    board = (
        board.with_variable(label_variable("namespace", "Namespace", "", multiple=True))
        .with_variable(label_variable("transferjob", "Job", 'namespace=~"$namespace"', multiple=True))
        .with_variable(label_variable("run", "Run", MATCHERS, multiple=False))
    )
    return add_rows(
        board,
        {
            "Run": [*_result_panels(), *_health_panels()],
            "Training": [*_stage_panels(), *_metric_panels()],
            "Throughput": throughput_panels(),
            "Storage": storage_panels(),
            "GPUs": gpu_panels(),
            "Pods": _pod_panels(),
            "Nodes, for runs on several nodes": node_panels(),
        },
    )


def _result_panels() -> Panels:
    """State, best metric and duration."""
    state = stat_panel("State", "Current state of the run, or its outcome.", Query(STATE, "state"), unit="none", span=4)
    return [
        state.mappings([value_mapping(STATES)]),
        stat_panel(
            "Best metric",
            "Metric of the best epoch of the last training stage.",
            Query(
                f"max by (name, split) (last_over_time(topwork:run_best_metric{{{RUN}}}[$__range]))",
                "{{name}}, {{split}}",
            ),
            unit="none",
            span=4,
            decimals=4,
        ),
        stat_panel("Time in stages", "Total wall time of all stages.", Query(ELAPSED, "time"), unit="s"),
    ]


def _health_panels() -> Panels:
    """Progress, dataset, gates and alerts."""
    idle = f"max(last_over_time((time() - topwork_last_progress_timestamp_seconds{{{RUN}}})[$__range:15s]))"
    rejected = f"sum({last_value('topwork_images_rejected_total', 'reason', RUN)})"
    firing = f'count(ALERTS{{alertname=~"Topwork.+", alertstate="firing", {RUN}}}) or vector(0)'
    return [
        stat_panel(
            "Time since last progress",
            "Time since the last completed step, image, file or checkpoint, as of the last scrape. An alert fires "
            "after 15 minutes.",
            Query(idle, "idle"),
            unit="s",
            steps=[(None, GREEN), (300, YELLOW), (900, RED)],
        ),
        stat_panel(
            "Images in the dataset",
            "Images in the stored dataset, and images that were rejected.",
            Query(f"max(last_over_time(topwork_dataset_images{{{RUN}}}[$__range]))", "stored"),
            Query(rejected, "rejected"),
            unit="short",
            span=4,
        ),
        stat_panel(
            "Failed gates",
            "Gates in spec.evaluate.gates that the model does not meet. Available after evaluation.",
            Query(f"max(last_over_time(topwork_gates_failed{{{RUN}}}[$__range]))", "gates"),
            unit="none",
            steps=[(None, GREEN), (1, RED)],
        ),
        stat_panel(
            "Alerts",
            "Alerts that are firing for this run.",
            Query(firing, "alerts"),
            unit="none",
            steps=[(None, GREEN), (1, ORANGE)],
        ),
    ]


def _stage_panels() -> Panels:
    """Stages and epochs."""
    planned = last_value("topwork_epochs_planned", "stage", RUN)
    epochs = f"{last_value('topwork_epoch', 'stage', RUN)} / on (stage) ({planned} > 0)"
    return [
        state_timeline(
            "Stages",
            "When each stage ran. Later processes also report earlier stages.",
            Query(f"max by (stage) (topwork_stage_running{{{RUN}}})", "{{stage}}"),
            states=STAGE_STATES,
            span=12,
        ),
        bar_gauge(
            "Stage duration",
            "Wall time of each completed stage.",
            Query(last_value("topwork_stage_duration_seconds", "stage", RUN), "{{stage}}"),
            unit="s",
            span=6,
        ),
        bar_gauge(
            "Epochs",
            "Completed share of the planned epochs. Early stopping may skip some.",
            Query(epochs, "{{stage}}"),
            unit="percentunit",
            span=6,
            maximum=1,
        ),
    ]


def _metric_panels() -> Panels:
    """Loss, metrics and learning rate."""
    return [
        time_series(
            "Loss",
            "Training and validation loss of the last epoch, and loss of the evaluation on the test split. A "
            "validation loss that rises while the training loss falls indicates overfitting.",
            Query(f"max by (split) (topwork_loss{{{RUN}}})", "{{split}}"),
            unit="none",
            minimum=None,
        ),
        time_series(
            "Metrics",
            "Training and validation metrics of the last epoch, and metrics of the evaluation on the test split.",
            Query(f"max by (name, split) (topwork_metric{{{RUN}}})", "{{name}}, {{split}}"),
            unit="none",
            minimum=None,
        ),
        time_series(
            "Learning rate",
            "Learning rate of the last step.",
            Query(f"max(topwork_learning_rate{{{RUN}}})", "learning rate"),
            unit="sci",
            minimum=None,
        ),
    ]


def _pod_panels() -> Panels:
    """Pods, from kube-state-metrics."""
    phases = " + on (namespace, pod) ".join(
        f'{number} * max by (namespace, pod) (kube_pod_status_phase{{{PODS}, phase="{name}"}})'
        for number, (name, _) in PHASES.items()
    )
    pods = f"count(count by (namespace, pod) (last_over_time(kube_pod_status_phase{{{PODS}}}[$__range])))"
    restarts = (
        "sum(max by (namespace, pod, container) "
        f"(last_over_time(kube_pod_container_status_restarts_total{{{PODS}}}[$__range])))"
    )
    startup = (
        f"min(min_over_time(topwork_stage_start_timestamp_seconds{{{RUN}}}[$__range])) - "
        f"min(last_over_time(kube_job_status_start_time{{{JOB}}}[$__range]))"
    )
    return [
        state_timeline(
            "Pods",
            "Phase of each pod of the run, from kube-state-metrics. A pod is also Pending while pull and transfer run "
            "in its init containers.",
            Query(phases, "{{pod}}"),
            states=PHASES,
            span=12,
            height=4,
        ),
        stat_panel(
            "Pods and restarts",
            "Pods of this run, more than one per node of the run if it was stopped or retried, and restarts of their "
            "containers, which only a machine causes.",
            Query(pods, "pods"),
            Query(restarts, "restarts"),
            unit="none",
            span=4,
        ),
        stat_panel(
            "Allocated GPUs",
            "GPUs allocated to the pods of the run, whether or not they are in use.",
            Query(f"max(last_over_time(topwork:run_gpus{{{RUN}}}[$__range]))", "GPUs"),
            unit="none",
            span=4,
        ),
        stat_panel(
            "Startup time",
            "Time from the start of the Job to the start of its first stage: scheduling, image pull and volume setup.",
            Query(startup, "startup"),
            unit="s",
            span=4,
            steps=[(None, GREEN), (600, YELLOW), (3600, ORANGE)],
        ),
    ]
