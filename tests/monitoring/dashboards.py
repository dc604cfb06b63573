"""Reads the committed dashboards: their panels, queries and variables."""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from tests.monitoring.prometheus_server import ROOT

DASHBOARD_DIRECTORY = ROOT / "charts/topwork/dashboards"
DASHBOARDS = ("jobs.json", "job.json")
NODES_ROW = "Nodes, for runs on several nodes"
"""Row of the dashboard Job that has no data for a run on one node."""


class PanelQuery(NamedTuple):
    """A query of a panel."""

    dashboard: str
    row: str
    panel: str
    ref_id: str
    expr: str
    instant: bool

    @property
    def name(self) -> str:
        return f"{self.dashboard} / {self.panel} / {self.ref_id}"


def load_dashboard(name: str) -> dict[str, Any]:
    return json.loads((DASHBOARD_DIRECTORY / name).read_text())


def panels(name: str) -> list[dict[str, Any]]:
    """Return all panels except row headings."""
    return [panel for panel in load_dashboard(name)["panels"] if panel["type"] != "row"]


def queries() -> Iterator[PanelQuery]:
    """Yield every query of every panel."""
    for name in DASHBOARDS:
        row = ""
        for panel in load_dashboard(name)["panels"]:
            if panel["type"] == "row":
                row = panel["title"]
                continue
            for target in panel["targets"]:
                instant = target.get("instant", False)
                yield PanelQuery(name, row, panel["title"], target["refId"], target["expr"], instant)


def variables() -> Iterator[tuple[str, str, str]]:
    """Yield every variable with a Prometheus query: its dashboard, its name and its query."""
    for name in DASHBOARDS:
        for variable in load_dashboard(name)["templating"]["list"]:
            if variable["type"] == "query":
                yield name, variable["name"], variable["query"]


def substitute_variables(text: str, values: Mapping[str, str]) -> str:
    """Replace variables with their values, as Grafana does before it sends a query. `$1` is not a variable."""
    return re.sub(r"\$([a-z_]\w*)", lambda match: values[match[1]], text)
