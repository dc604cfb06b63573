"""The *Jobs* dashboard: state, results and GPU usage of all runs."""

from typing import Any, NamedTuple

from grafana_foundation_sdk.builders import dashboard, prometheus, table
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models.prometheus import PromQueryFormat
from panels import (
    GREEN,
    ORANGE,
    RED,
    SOURCE,
    STATES,
    YELLOW,
    Panels,
    Query,
    add_rows,
    bar_gauge,
    create_dashboard,
    instant_query,
    label_variable,
    stat_panel,
    thresholds,
    time_series,
    value_mapping,
)

MATCHERS = 'namespace=~"$namespace", team=~"$team"'
RUNS = f'{MATCHERS}, transferjob=~"$transferjob", run=~"$run"'
LAST = f"last_over_time(topwork:run_state{{{RUNS}}}[$__range])"
# One sample per minute is precise enough for hours and cheap enough for a month.
GPU_HOURS = f"sum_over_time(topwork:run_gpus{{{RUNS}}}[$__range:1m]) / 60"

STATE = (
    f"max by (namespace, transferjob, run) (topwork:run_state{{{RUNS}}} "
    f"or on (namespace, run) {LAST} > 2 < 6 or on (namespace, run) 0 * {LAST})"
)
TEAM = f"max by (namespace, run, team) (last_over_time(topwork:run_info{{{RUNS}}}[$__range]))"
ELAPSED = (
    "sum by (namespace, run) (max by (namespace, run, stage) "
    f"(last_over_time(topwork_stage_duration_seconds{{{RUNS}}}[$__range])) or "
    f"(time() - max by (namespace, run, stage) (topwork_stage_start_timestamp_seconds{{{RUNS}}} and "
    f"on (namespace, run, stage) topwork_stage_running{{{RUNS}}} == 1)))"
)
EPOCHS = f"sum by (namespace, run) (max by (namespace, run, stage) (last_over_time(topwork_epoch{{{RUNS}}}[$__range])))"
BEST = f"max by (namespace, run, name) (last_over_time(topwork:run_best_metric{{{RUNS}}}[$__range]))"
WAIT = f"max by (namespace, run) (last_over_time(topwork:run_input_wait:ratio_rate5m{{{RUNS}}}[$__range]))"


class Column(NamedTuple):
    """A column of the table: its PromQL, title, unit and decimals."""

    expr: str
    title: str
    unit: str
    decimals: int = 0


COLUMNS = (
    Column(STATE, "State", "none"),
    Column(TEAM, "Team query", "none"),
    Column(ELAPSED, "Time in stages", "s"),
    Column(EPOCHS, "Epochs", "none"),
    Column(BEST, "Best", "none", 4),
    Column(WAIT, "Input wait", "percentunit"),
    Column(f"sum by (namespace, run) ({GPU_HOURS})", "GPU-hours", "none", 2),
)
LABELS = {"namespace": "Namespace", "team": "Team", "transferjob": "Job", "run": "Run", "name": "Metric"}
ORDER = ["Namespace", "Team", "Job", "Run", "State", "Time in stages", "Epochs", "Metric", "Best", "Input wait"]


def build_jobs_dashboard() -> dashboard.Dashboard:
    """Build the dashboard of all runs."""
    board = create_dashboard("topwork / Jobs", "topwork-jobs", "All runs: state, results and GPU usage.")
    board = (
        board.with_variable(label_variable("namespace", "Namespace", "", multiple=True))
        .with_variable(label_variable("team", "Team", 'namespace=~"$namespace"', multiple=True))
        .with_variable(label_variable("transferjob", "Job", MATCHERS, multiple=True))
        .with_variable(label_variable("run", "Run", f'{MATCHERS}, transferjob=~"$transferjob"', multiple=True))
    )
    return add_rows(
        board,
        {
            "Now": _count_panels(),
            "Runs": [_run_table()],
            "Over time": _history_panels(),
            "Usage in the selected time range": _usage_panels(),
            "Controller": _controller_panels(),
        },
    )


def _count_panels() -> Panels:
    """Run counts by state, GPUs and alerts."""

    def now(state: int) -> str:
        return f"count(topwork:run_state{{{RUNS}}} == {state}) or vector(0)"

    def ended(state: int) -> str:
        return f"count(max by (namespace, run) ({LAST}) == {state}) or vector(0)"

    firing = f'count(ALERTS{{alertname=~"Topwork.+", alertstate="firing", {RUNS}}}) or vector(0)'

    return [
        stat_panel("Running", "Runs with a running stage or pod.", Query(now(2), "running"), unit="none"),
        stat_panel(
            "Pending",
            "Runs whose pod waits for a node, its image or its volumes, or whose Job is suspended by a queue. Runs "
            "that spec.suspend stops are not included.",
            Query(now(1), "pending"),
            unit="none",
            steps=[(None, GREEN), (1, YELLOW)],
        ),
        stat_panel(
            "Failed",
            "Runs that failed in the selected time range.",
            Query(ended(4), "failed"),
            unit="none",
            steps=[(None, GREEN), (1, RED)],
        ),
        stat_panel(
            "Succeeded", "Runs that succeeded in the selected time range.", Query(ended(3), "succeeded"), unit="none"
        ),
        stat_panel(
            "Allocated GPUs",
            "GPUs allocated to the pods of these runs, whether or not they are in use.",
            Query(f"sum(topwork:run_gpus{{{RUNS}}}) or vector(0)", "GPUs"),
            unit="none",
            span=4,
        ),
        stat_panel(
            "GPU-hours",
            "GPU-hours in the selected time range: allocated GPUs multiplied by hours.",
            Query(f"sum({GPU_HOURS})", "GPU-hours"),
            unit="none",
            span=4,
            decimals=1,
        ),
        stat_panel(
            "Alerts",
            "Alerts that are firing for these runs and, if all runs are selected, for the controller.",
            Query(firing, "alerts"),
            unit="none",
            span=4,
            steps=[(None, GREEN), (1, ORANGE)],
        ),
    ]


def _run_table() -> table.Panel:
    """Create a table with one row per run."""
    panel = (
        table.Panel()
        .title("Runs")
        .description(
            "All runs in the selected time range. The name of a run links to its dashboard. Input wait is the share of "
            "training time spent waiting for data. Best is the metric of the best epoch."
        )
        .datasource(SOURCE)
        .unit("none")
        .span(24)
        .height(10)
        .thresholds(thresholds([(None, "text")]))
        .targets([_table_query(column, chr(ord("A") + index)) for index, column in enumerate(COLUMNS)])
        .with_transformation(models.DataTransformerConfig("merge", options={}))
        .with_transformation(models.DataTransformerConfig("organize", options=_organize_options()))
        .override_by_name("Run", [models.DynamicConfigValue("links", [_link()])])
        .override_by_name("State", [models.DynamicConfigValue("mappings", [value_mapping(STATES)]), _colored_text()])
    )
    for column in COLUMNS:
        values = [
            models.DynamicConfigValue("unit", column.unit),
            models.DynamicConfigValue("decimals", column.decimals),
        ]
        panel.override_by_name(column.title, values)
    return panel


def _table_query(column: Column, ref_id: str) -> prometheus.Dataquery:
    return instant_query(Query(column.expr, ""), ref_id).format(PromQueryFormat.TABLE)


def _organize_options() -> dict[str, Any]:
    """Rename, order and hide columns of the merged table. The team is a label; the value of its query is not shown."""
    values = {f"Value #{chr(ord('A') + index)}": column.title for index, column in enumerate(COLUMNS)}
    renamed = LABELS | values
    shown = [name for title in [*ORDER, "GPU-hours"] for name, new in renamed.items() if new == title]
    hidden = ["Time", *(name for name in values if renamed[name] == "Team query")]
    return {
        "excludeByName": dict.fromkeys(hidden, True),
        "indexByName": {name: index for index, name in enumerate(shown)},
        "renameByName": renamed,
    }


def _link() -> dict[str, Any]:
    url = "/d/topwork-job?var-datasource=${datasource}&var-run=${__value.text}&${__url_time_range}"
    return {"title": "Show this run", "url": url, "targetBlank": False}


def _colored_text() -> models.DynamicConfigValue:
    return models.DynamicConfigValue("custom.cellOptions", {"type": "color-text"})


def _history_panels() -> Panels:
    """Runs, GPUs and results over time."""
    busy = (
        f"sum(topwork:run_gpus{{{RUNS}}} * on (namespace, run) group_left () "
        f"max by (namespace, run) (topwork:run_gpu_utilization:ratio{{{RUNS}}}))"
    )

    return [
        time_series(
            "Runs",
            "Pending and running runs.",
            Query(f"count(topwork:run_state{{{RUNS}}} == 2) or vector(0)", "running"),
            Query(f"count(topwork:run_state{{{RUNS}}} == 1) or vector(0)", "pending"),
            unit="none",
        ),
        time_series(
            "GPUs",
            "Allocated GPUs, and how many of them were busy: utilization from DCGM, or from NVML if DCGM is missing.",
            Query(f"sum(topwork:run_gpus{{{RUNS}}})", "allocated"),
            Query(busy, "busy"),
            unit="none",
        ),
        time_series(
            "Best metric",
            "Metric of the best epoch, by job: how the results of a job change from run to run.",
            Query(
                f"max by (transferjob, name) (topwork:run_best_metric{{{RUNS}}})",
                "{{transferjob}}, {{name}}",
            ),
            unit="none",
            minimum=None,
        ),
    ]


def _usage_panels() -> Panels:
    """GPU-hours and run durations."""
    durations = (
        "avg by (transferjob) (sum by (namespace, transferjob, run) (max by (namespace, transferjob, run, stage) "
        f"(last_over_time(topwork_stage_duration_seconds{{{RUNS}}}[$__range]))))"
    )
    hours: Panels = [
        bar_gauge(
            f"GPU-hours by {title}",
            f"GPU-hours by {title}: allocated GPUs multiplied by hours.",
            Query(f"sum by ({label}) ({GPU_HOURS})", f"{{{{{label}}}}}"),
            unit="none",
            span=6,
        )
        for label, title in (("namespace", "namespace"), ("team", "team"), ("transferjob", "job"))
    ]
    return [
        *hours,
        bar_gauge(
            "Run duration by job",
            "Total wall time of the completed stages of a run, averaged over the runs of a job.",
            Query(durations, "{{transferjob}}"),
            unit="s",
            span=6,
        ),
    ]


def _controller_panels() -> Panels:
    """Reconciles and work queue of the controller."""
    buckets = "sum by (le) (rate(topwork_controller_reconcile_duration_seconds_bucket[$__rate_interval]))"
    return [
        time_series(
            "Reconciles",
            "Reconciles per second of all controllers, by result. Failed reconciles are retried after a delay.",
            Query("sum by (result) (rate(topwork_controller_reconciles_total[$__rate_interval]))", "{{result}}"),
            unit="ops",
        ),
        time_series(
            "Reconcile duration",
            "Time to bring a TransferJob, its Job and its status up to date: median and 99th percentile.",
            Query(f"histogram_quantile(0.5, {buckets})", "median"),
            Query(f"histogram_quantile(0.99, {buckets})", "99 %"),
            unit="s",
        ),
        time_series(
            "Oldest due TransferJob",
            "Time for which a TransferJob has been waiting for the controller. An alert fires above 5 minutes.",
            Query(
                "max by (namespace) (topwork_controller_queue_oldest_seconds and topwork_controller_leader == 1)",
                "{{namespace}}",
            ),
            unit="s",
            steps=[(None, GREEN), (300, RED)],
        ),
    ]
