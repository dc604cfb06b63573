"""What both dashboards are made of: queries, variables and kinds of panels, all with title, unit and description."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from grafana_foundation_sdk.builders import bargauge, common, dashboard, prometheus, stat, statetimeline, timeseries
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models import common as options
from grafana_foundation_sdk.models import dashboard as models

SOURCE = models.DataSourceRef("prometheus", "${datasource}")
# Of Grafana's palette, told apart by people who see no red or green by their order in each panel, too.
GREEN, YELLOW, ORANGE, RED, BLUE, GREY = "green", "yellow", "orange", "red", "blue", "text"
ALL = ".*"
"""Matches series without the label, too, such as those of a laptop, which have no namespace."""

Panels = list[Builder[models.Panel]]
Steps = Sequence[tuple[float | None, str]]
"""Thresholds: from which value on which colour; the first has no value."""
CALM: Steps = [(None, GREEN)]
PLAIN: Steps = [(None, BLUE)]

STATES: Mapping[str, tuple[str, str]] = {
    "0": ("ended, outcome not seen", GREY),
    "1": ("waiting", YELLOW),
    "2": ("running", BLUE),
    "3": ("done", GREEN),
    "4": ("failed", RED),
    "5": ("stopped", ORANGE),
}
"""What `topwork:run_state` says, and how it looks."""


class Query(NamedTuple):
    """One query of a panel: PromQL, and how its series are called, with labels in double braces."""

    expr: str
    legend: str


def start(title: str, uid: str, description: str) -> dashboard.Dashboard:
    """Begin a dashboard: its address, time range and the links to the other one."""
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
            .description("Prometheus that scrapes the jobs.")
            .type("prometheus")
        )
    )


def chosen(label: str, title: str, within: str, *, several: bool) -> dashboard.QueryVariable:
    """Let a value of a label of all runs be chosen.

    Args:
        label: The label, which also names the variable.
        title: What a reader sees.
        within: Matchers of the variables before it, such as `namespace=~"$namespace"`.
        several: Whether several, and all, may be chosen.
    """
    matchers = f"{{{within}}}" if within else ""
    variable = (
        dashboard.QueryVariable(label)
        .label(title)
        .datasource(SOURCE)
        .query(f"label_values(topwork_stage_info{matchers}, {label})")
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(models.VariableSort.ALPHABETICAL_ASC)
        .multi(several)
        .include_all(several)
    )
    if not several:
        return variable
    return variable.all_value(ALL).current(models.VariableOption(text="All", value="$__all", selected=True))


def lines(
    title: str,
    description: str,
    *queries: Query,
    unit: str,
    span: int = 8,
    least: float | None = 0,
    most: float | None = None,
    steps: Steps = CALM,
) -> timeseries.Panel:
    """Values over time; thresholds beyond the first are drawn as dashed lines."""
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
    if least is not None:
        panel.min(least)
    if most is not None:
        panel.max(most)
    return panel.targets([over_time(query, letter) for letter, query in lettered(queries)])


def numbers(
    title: str, description: str, *queries: Query, unit: str, span: int = 3, steps: Steps = PLAIN, decimals: int = 0
) -> stat.Panel:
    """The value of now of each query, large."""
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
        .targets([at_once(query, letter) for letter, query in lettered(queries)])
    )


def bars(
    title: str,
    description: str,
    query: Query,
    *,
    unit: str,
    span: int = 8,
    steps: Steps = PLAIN,
    most: float | None = None,
) -> bargauge.Panel:
    """The value of now of each series of a query, as a bar."""
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
        .targets([at_once(query, "A")])
    )
    return panel if most is None else panel.max(most)


def timeline(
    title: str, description: str, query: Query, *, states: Mapping[str, tuple[str, str]], span: int, height: int = 8
) -> statetimeline.Panel:
    """What state each series of a query was in, when."""
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
        .mappings([mapping(states)])
        .thresholds(thresholds(CALM))
        .targets([over_time(query, "A")])
    )


def with_rows(board: dashboard.Dashboard, rows: Mapping[str, Panels]) -> dashboard.Dashboard:
    """Add rows of panels below one another, each with its heading."""
    for title, panels in rows.items():
        board = board.with_row(dashboard.Row(title).collapsed(False))
        for panel in panels:
            board = board.with_panel(panel)
    return board


def seen_last(series: str, by: str, matchers: str) -> str:
    """What a series said last within the range, over all processes of a run: later ones repeat the earlier."""
    return f"max by ({by}) (last_over_time({series}{{{matchers}}}[$__range]))"


def thresholds(steps: Steps) -> dashboard.ThresholdsConfig:
    """From which value on which colour."""
    return (
        dashboard.ThresholdsConfig()
        .mode(models.ThresholdsMode.ABSOLUTE)
        .steps([models.Threshold(value, colour) for value, colour in steps])
    )


def mapping(states: Mapping[str, tuple[str, str]]) -> models.ValueMap:
    """Words and colours for numbers."""
    results = {
        value: models.ValueMappingResult(text=text, color=colour, index=index)
        for index, (value, (text, colour)) in enumerate(states.items())
    }
    return models.ValueMap(results)


def lettered(queries: Sequence[Query]) -> list[tuple[str, Query]]:
    """Number queries as Grafana does: A, B, C."""
    return [(chr(ord("A") + index), query) for index, query in enumerate(queries)]


def over_time(query: Query, letter: str) -> prometheus.Dataquery:
    """Ask for the whole range that the dashboard shows."""
    return _asked(query, letter).range()


def at_once(query: Query, letter: str) -> prometheus.Dataquery:
    """Ask for the end of the range that the dashboard shows."""
    return _asked(query, letter).instant()


def _asked(query: Query, letter: str) -> prometheus.Dataquery:
    return prometheus.Dataquery().expr(query.expr).legend_format(query.legend).ref_id(letter).datasource(SOURCE)
