"""The committed dashboards, read as Grafana reads them."""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from tests.monitoring.served import ROOT

FOLDER = ROOT / "charts/topwork/dashboards"
BOARDS = ("jobs.json", "job.json")


class Asked(NamedTuple):
    """A query of a panel."""

    board: str
    panel: str
    letter: str
    expr: str
    instant: bool

    @property
    def name(self) -> str:
        return f"{self.board} / {self.panel} / {self.letter}"


def board(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / name).read_text())


def panels(name: str) -> list[dict[str, Any]]:
    """All panels but the headings."""
    return [panel for panel in board(name)["panels"] if panel["type"] != "row"]


def queries() -> Iterator[Asked]:
    """Every query of every panel."""
    for name in BOARDS:
        for panel in panels(name):
            for target in panel["targets"]:
                yield Asked(name, panel["title"], target["refId"], target["expr"], target.get("instant", False))


def variables() -> Iterator[tuple[str, str, str]]:
    """Every variable that asks Prometheus: its dashboard, its name, and its query."""
    for name in BOARDS:
        for variable in board(name)["templating"]["list"]:
            if variable["type"] == "query":
                yield name, variable["name"], variable["query"]


def filled(text: str, values: Mapping[str, str]) -> str:
    """Put values for variables, as Grafana does before it sends a query."""
    return re.sub(r"\$(\w+)", lambda found: values[found[1]], text)
