"""Grafana dashboards as code: `charts/generate.py` writes them to charts/topwork/dashboards/."""

import json
from collections.abc import Iterator
from typing import Any

from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard
from job_dashboard import build_job_dashboard
from jobs_dashboard import build_jobs_dashboard


def files() -> Iterator[tuple[str, str]]:
    """Yield the path in charts/topwork and the content of each dashboard."""
    yield "dashboards/jobs.json", to_json(build_jobs_dashboard().build())
    yield "dashboards/job.json", to_json(build_job_dashboard().build())


def to_json(dashboard: Dashboard) -> str:
    """Encode a dashboard as reproducible JSON, with sorted keys and numbered panels."""
    content = json.loads(JSONEncoder().encode(dashboard))
    for number, panel in enumerate(content["panels"], start=1):
        panel["id"] = number
    return json.dumps(remove_nulls(content), indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def remove_nulls(content: Any) -> Any:
    """Remove null values, except `value` of the lowest threshold step, which Grafana requires to be null."""
    if isinstance(content, dict):
        return {key: remove_nulls(value) for key, value in content.items() if value is not None or key == "value"}
    if isinstance(content, list):
        return [remove_nulls(item) for item in content]
    return content
