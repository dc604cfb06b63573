"""Building blocks of the dashboards: variables, queries and panels with title, description, unit and thresholds."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from grafana_foundation_sdk.builders import bargauge, common, dashboard, prometheus, stat, statetimeline, timeseries
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models import common as options
from grafana_foundation_sdk.models import dashboard as models

SOURCE = models.DataSourceRef("prometheus", "${datasource}")
# Names in Grafana's palette. Panels never distinguish states by color alone: some people cannot tell red from green.
GREEN, YELLOW, ORANGE, RED, BLUE, GRAY = "green", "yellow", "orange", "red", "blue", "text"
ALL = ".*"
"""Also matches series without the label, such as series from outside Kubernetes, which have no namespace."""

Panels = list[Builder[models.Panel]]
Steps = Sequence[tuple[float | None, str]]
"""Thresholds as pairs of lower bound and color; the first has no lower bound."""
GREEN_ONLY: Steps = [(None, GREEN)]
BLUE_ONLY: Steps = [(None, BLUE)]

STATES: Mapping[str, tuple[str, str]] = {
    "0": ("ended, outcome unknown", GRAY),
    "1": ("pending", YELLOW),
    "2": ("running", BLUE),
    "3": ("succeeded", GREEN),
    "4": ("failed", RED),
    "5": ("stopped", ORANGE),
    "6": ("suspended", YELLOW),
}
"""Text and color of each value of `topwork:run_state`."""


class Query(NamedTuple):
    """A PromQL query of a panel, and the legend of its series, with labels in double braces."""

    expr: str
    legend: str


def create_dashboard(title: str, uid: str, description: str) -> dashboard.Dashboard:
    """Create an empty dashboard with a data source variable and a link to the other dashboard."""
    return (
        dashboard.Dashboard(title)
        .uid(uid)
        .description(description)
        .tags(["topwork"])
        .timezone("browser")
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .refresh("30s")
        .time("now-6h", "now")
        .link(
            dashboard.DashboardLink("topwork")
            .type(models.DashboardLinkType.DASHBOARDS)
            .tags(["topwork"])
            .as_dropdown(False)
            .include_vars(False)
            .keep_time(True)
        )
        .with_variable(
            dashboard.DatasourceVariable("datasource")
            .label("Data source")
            .description("Prometheus server that scrapes the jobs.")
            .type("prometheus")
        )
    )


def label_variable(label: str, title: str, matchers: str, *, multiple: bool) -> dashboard.QueryVariable:
    """Create a variable to select values of a label.

    Args:
        label: Name of the label, and of the variable.
        title: Displayed name.
        matchers: Label matchers that use preceding variables, such as `namespace=~"$namespace"`.
        multiple: Whether users can select several values, or all.
    """
    # A TransferJob whose pods have not started yet has only the series of the controller.
    names = '__name__=~"topwork_(stage|transferjob)_info"'
    selector = ", ".join(filter(None, [names, matchers]))
    variable = (
        dashboard.QueryVariable(label)
        .label(title)
        .datasource(SOURCE)
        .query(f"label_values({{{selector}}}, {label})")
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(models.VariableSort.ALPHABETICAL_ASC)
        .multi(multiple)
        .include_all(multiple)
    )
    if not multiple:
        return variable
    return variable.all_value(ALL).current(models.VariableOption(text="All", value="$__all", selected=True))


def time_series(
    title: str,
    description: str,
    *queries: Query,
    unit: str,
    span: int = 8,
    minimum: float | None = 0,
    maximum: float | None = None,
    steps: Steps = GREEN_ONLY,
) -> timeseries.Panel:
    """Create a time series panel; thresholds except the first are drawn as dashed lines."""
    panel = (
        timeseries.Panel()
        .title(title)
        .description(description)
        .datasource(SOURCE)
        .unit(unit)
        .span(span)
        .height(8)
        .line_width(1.5)
        .fill_opacity(8)
        .show_points(options.VisibilityMode.AUTO)
        .legend(
            common.VizLegendOptions()
            .display_mode(options.LegendDisplayMode.LIST)
            .placement(options.LegendPlacement.BOTTOM)
            .show_legend(True)
        )
        .tooltip(common.VizTooltipOptions().mode(options.TooltipDisplayMode.MULTI))
        .thresholds(thresholds(steps))
    )
    if len(steps) > 1:
        panel.thresholds_style(common.GraphThresholdsStyleConfig().mode(options.GraphTresholdsStyleMode.DASHED))
    if minimum is not None:
        panel.min(minimum)
    if maximum is not None:
        panel.max(maximum)
    return panel.targets([range_query(query, ref_id) for ref_id, query in with_ref_ids(queries)])


def stat_panel(
    title: str, description: str, *queries: Query, unit: str, span: int = 3, steps: Steps = BLUE_ONLY, decimals: int = 0
) -> stat.Panel:
    """Create a panel with the current value of each query."""
    return (
        stat.Panel()
        .title(title)
        .description(description)
        .datasource(SOURCE)
        .unit(unit)
        .decimals(decimals)
        .span(span)
        .height(4)
        .graph_mode(options.BigValueGraphMode.NONE)
        .color_mode(options.BigValueColorMode.VALUE)
        .text_mode(options.BigValueTextMode.AUTO)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .thresholds(thresholds(steps))
        .targets([instant_query(query, ref_id) for ref_id, query in with_ref_ids(queries)])
    )


def bar_gauge(
    title: str,
    description: str,
    query: Query,
    *,
    unit: str,
    span: int = 8,
    steps: Steps = BLUE_ONLY,
    maximum: float | None = None,
) -> bargauge.Panel:
    """Create a panel with the current value of each series of a query, as bars."""
    panel = (
        bargauge.Panel()
        .title(title)
        .description(description)
        .datasource(SOURCE)
        .unit(unit)
        .span(span)
        .height(8)
        .min(0)
        .orientation(options.VizOrientation.HORIZONTAL)
        .display_mode(options.BarGaugeDisplayMode.BASIC)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .thresholds(thresholds(steps))
        .targets([instant_query(query, "A")])
    )
    return panel if maximum is None else panel.max(maximum)


def state_timeline(
    title: str, description: str, query: Query, *, states: Mapping[str, tuple[str, str]], span: int, height: int = 8
) -> statetimeline.Panel:
    """Create a panel with the state of each series of a query over time."""
    return (
        statetimeline.Panel()
        .title(title)
        .description(description)
        .datasource(SOURCE)
        .unit("none")
        .span(span)
        .height(height)
        .merge_values(True)
        .show_value(options.VisibilityMode.AUTO)
        .row_height(0.8)
        .fill_opacity(80)
        .mappings([value_mapping(states)])
        .thresholds(thresholds(GREEN_ONLY))
        .targets([range_query(query, "A")])
    )


def add_rows(board: dashboard.Dashboard, rows: Mapping[str, Panels]) -> dashboard.Dashboard:
    """Add rows of panels, by row title."""
    for title, panels in rows.items():
        board = board.with_row(dashboard.Row(title).collapsed(False))
        for panel in panels:
            board = board.with_panel(panel)
    return board


def last_value(series: str, by: str, matchers: str) -> str:
    """Return PromQL for the last value of a series in the time range, over all processes of a run."""
    return f"max by ({by}) (last_over_time({series}{{{matchers}}}[$__range]))"


def name_node(expr: str) -> str:
    """Return PromQL that adds the label `of_node`, such as ` of node 1`, to the series of runs on several nodes."""
    return f'label_replace({expr}, "of_node", " of node $1", "node", "(.+)")'


def thresholds(steps: Steps) -> dashboard.ThresholdsConfig:
    """Create absolute thresholds."""
    return (
        dashboard.ThresholdsConfig()
        .mode(models.ThresholdsMode.ABSOLUTE)
        .steps([models.Threshold(value, color) for value, color in steps])
    )


def value_mapping(states: Mapping[str, tuple[str, str]]) -> models.ValueMap:
    """Map numbers to texts and colors."""
    results = {
        value: models.ValueMappingResult(text=text, color=color, index=index)
        for index, (value, (text, color)) in enumerate(states.items())
    }
    return models.ValueMap(results)


def with_ref_ids(queries: Sequence[Query]) -> list[tuple[str, Query]]:
    """Assign reference IDs as Grafana does: A, B, C."""
    return [(chr(ord("A") + index), query) for index, query in enumerate(queries)]


def range_query(query: Query, ref_id: str) -> prometheus.Dataquery:
    """Create a query over the selected time range."""
    return _query(query, ref_id).range()


def instant_query(query: Query, ref_id: str) -> prometheus.Dataquery:
    """Create a query at the end of the selected time range."""
    return _query(query, ref_id).instant()


def _query(query: Query, ref_id: str) -> prometheus.Dataquery:
    return prometheus.Dataquery().expr(query.expr).legend_format(query.legend).ref_id(ref_id).datasource(SOURCE)
