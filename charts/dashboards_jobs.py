"""The dashboard *Jobs*: all runs, what they do, how they ended and what they cost."""

from typing import Any, NamedTuple

from dashboards_parts import (
    GREEN,
    ORANGE,
    RED,
    SOURCE,
    STATES,
    YELLOW,
    Panels,
    Query,
    at_once,
    bars,
    chosen,
    lines,
    mapping,
    numbers,
    start,
    thresholds,
    with_rows,
)
from grafana_foundation_sdk.builders import dashboard, prometheus, table
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

IN = 'namespace=~"$namespace", team=~"$team"'
RUNS = f'{IN}, transferjob=~"$transferjob", run=~"$run"'
LAST = f"last_over_time(topwork:run_state{{{RUNS}}}[$__range])"
# One point a minute is enough for hours, and bounded for a month.
GPU_HOURS = f"sum_over_time(topwork:run_gpus{{{RUNS}}}[$__range:1m]) / 60"

STATE = (
    f"max by (namespace, transferjob, run) (topwork:run_state{{{RUNS}}} "
    f"or on (namespace, run) {LAST} > 2 or on (namespace, run) 0 * {LAST})"
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
    """A query of the table: its PromQL and how its values are called and shown."""

    expr: str
    title: str
    unit: str
    decimals: int = 0


COLUMNS = (
    Column(STATE, "State", "none"),
    Column(TEAM, "Team known", "none"),
    Column(ELAPSED, "Time in stages", "s"),
    Column(EPOCHS, "Epochs", "none"),
    Column(BEST, "Best", "none", 4),
    Column(WAIT, "Input wait", "percentunit"),
    Column(f"sum by (namespace, run) ({GPU_HOURS})", "GPU-hours", "none", 2),
)
LABELS = {"namespace": "Namespace", "team": "Team", "transferjob": "Job", "run": "Run", "name": "Metric"}
ORDER = ["Namespace", "Team", "Job", "Run", "State", "Time in stages", "Epochs", "Metric", "Best", "Input wait"]


def jobs_dashboard() -> dashboard.Dashboard:
    """All runs."""
    board = start("topwork / Jobs", "topwork-jobs", "All runs: what they do, how they ended, what they cost.")
    board = (
        board.with_variable(chosen("namespace", "Namespace", "", several=True))
        .with_variable(chosen("team", "Team", 'namespace=~"$namespace"', several=True))
        .with_variable(chosen("transferjob", "Job", IN, several=True))
        .with_variable(chosen("run", "Run", f'{IN}, transferjob=~"$transferjob"', several=True))
    )
    return with_rows(
        board, {"Now": _counts(), "Runs": [_table()], "Over time": _history(), "Usage in the time shown": _usage()}
    )


def _counts() -> Panels:
    """How many there are of each kind now."""

    def now(state: int) -> str:
        return f"count(topwork:run_state{{{RUNS}}} == {state}) or vector(0)"

    def ended(state: int) -> str:
        return f"count(max by (namespace, run) ({LAST}) == {state}) or vector(0)"

    firing = f'count(ALERTS{{alertname=~"Topwork.+", alertstate="firing", {RUNS}}}) or vector(0)'

    return [
        numbers("Running", "Runs of which a stage runs now.", Query(now(2), "running"), unit="none"),
        numbers(
            "Waiting",
            "Runs whose pod waits for a node, its image or its volumes. A Job that a queue holds back has no pod, "
            "and is not seen here.",
            Query(now(1), "waiting"),
            unit="none",
            steps=[(None, GREEN), (1, YELLOW)],
        ),
        numbers(
            "Failed",
            "Runs that failed within the time shown.",
            Query(ended(4), "failed"),
            unit="none",
            steps=[(None, GREEN), (1, RED)],
        ),
        numbers("Done", "Runs that ended well within the time shown.", Query(ended(3), "done"), unit="none"),
        numbers(
            "GPUs held",
            "GPUs that the pods of these runs hold now, idle or not.",
            Query(f"sum(topwork:run_gpus{{{RUNS}}}) or vector(0)", "GPUs"),
            unit="none",
            span=4,
        ),
        numbers(
            "GPU-hours",
            "GPUs held, times the hours they were held within the time shown.",
            Query(f"sum({GPU_HOURS})", "GPU-hours"),
            unit="none",
            span=4,
            decimals=1,
        ),
        numbers(
            "Alerts",
            "Alerts on these runs that fire now.",
            Query(firing, "alerts"),
            unit="none",
            span=4,
            steps=[(None, GREEN), (1, ORANGE)],
        ),
    ]


def _table() -> table.Panel:
    """All runs, one a line."""
    panel = (
        table.Panel()
        .title("Runs")
        .description(
            "All runs seen within the time shown. The name of a run leads to its dashboard. Input wait is the share of "
            "training time spent waiting for data, best the metric of the weights that are kept."
        )
        .datasource(SOURCE)
        .unit("none")
        .span(24)
        .height(10)
        .thresholds(thresholds([(None, "text")]))
        .targets([_rows(column, chr(ord("A") + index)) for index, column in enumerate(COLUMNS)])
        .with_transformation(models.DataTransformerConfig("merge", options={}))
        .with_transformation(models.DataTransformerConfig("organize", options=_organized()))
        .override_by_name("Run", [models.DynamicConfigValue("links", [_link()])])
        .override_by_name("State", [models.DynamicConfigValue("mappings", [mapping(STATES)]), _coloured()])
    )
    for column in COLUMNS:
        values = [
            models.DynamicConfigValue("unit", column.unit),
            models.DynamicConfigValue("decimals", column.decimals),
        ]
        panel.override_by_name(column.title, values)
    return panel


def _rows(column: Column, letter: str) -> prometheus.Dataquery:
    return at_once(Query(column.expr, ""), letter).format(PromQueryFormat.TABLE)


def _organized() -> dict[str, Any]:
    """Name, order and hide the columns of the merged table; the team is a label, its query has no value of use."""
    values = {f"Value #{chr(ord('A') + index)}": column.title for index, column in enumerate(COLUMNS)}
    renamed = LABELS | values
    shown = [name for title in [*ORDER, "GPU-hours"] for name, given in renamed.items() if given == title]
    hidden = ["Time", *(name for name in values if renamed[name] == "Team known")]
    return {
        "excludeByName": dict.fromkeys(hidden, True),
        "indexByName": {name: index for index, name in enumerate(shown)},
        "renameByName": renamed,
    }


def _link() -> dict[str, Any]:
    address = "/d/topwork-job?var-datasource=${datasource}&var-run=${__value.text}&${__url_time_range}"
    return {"title": "Show this run", "url": address, "targetBlank": False}


def _coloured() -> models.DynamicConfigValue:
    return models.DynamicConfigValue("custom.cellOptions", {"type": "color-text"})


def _history() -> Panels:
    """How that came."""
    busy = (
        f"sum(topwork:run_gpus{{{RUNS}}} * on (namespace, run) group_left () "
        f"max by (namespace, run) (topwork:run_gpu_utilization:ratio{{{RUNS}}}))"
    )

    return [
        lines(
            "Runs",
            "Runs that waited and ran.",
            Query(f"count(topwork:run_state{{{RUNS}}} == 2) or vector(0)", "running"),
            Query(f"count(topwork:run_state{{{RUNS}}} == 1) or vector(0)", "waiting"),
            unit="none",
        ),
        lines(
            "GPUs",
            "GPUs held, and how many of them were busy: utilisation from DCGM, and else from NVML.",
            Query(f"sum(topwork:run_gpus{{{RUNS}}})", "held"),
            Query(busy, "busy"),
            unit="none",
        ),
        lines(
            "Best metric",
            "Metric of the weights that are kept, by job: how a job gets better or worse from run to run.",
            Query(
                f"max by (transferjob, name) (topwork:run_best_metric{{{RUNS}}})",
                "{{transferjob}}, {{name}}",
            ),
            unit="none",
            least=None,
        ),
    ]


def _usage() -> Panels:
    """What they took."""
    durations = (
        "avg by (transferjob) (sum by (namespace, transferjob, run) (max by (namespace, transferjob, run, stage) "
        f"(last_over_time(topwork_stage_duration_seconds{{{RUNS}}}[$__range]))))"
    )
    hours: Panels = [
        bars(
            f"GPU-hours by {title}",
            f"GPUs held, times the hours they were held, by {title}.",
            Query(f"sum by ({label}) ({GPU_HOURS})", f"{{{{{label}}}}}"),
            unit="none",
            span=6,
        )
        for label, title in (("namespace", "namespace"), ("team", "team"), ("transferjob", "job"))
    ]
    return [
        *hours,
        bars(
            "Time of a run, by job",
            "Wall time of the stages that have ended, summed for a run; the mean over the runs of a job.",
            Query(durations, "{{transferjob}}"),
            unit="s",
            span=6,
        ),
    ]
