"""Rules and dashboards as files: promtool accepts them, each alert leads to its runbook, each panel explains itself."""

import importlib.util
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from tests.monitoring.panels import BOARDS, FOLDER, board, panels, queries
from tests.monitoring.served import ROOT, RULES, needed

HERE = Path(__file__).parent
ALERTS = [rule for group in yaml.safe_load((RULES / "alerts.yaml").read_text())["groups"] for rule in group["rules"]]
RUNBOOKS = "https://github.com/topwork/topwork/blob/main/docs/runbooks.md"


def test_promtool_accepts_the_rules():
    checked = subprocess.run(
        [needed("promtool"), "check", "rules", *RULES.glob("*.yaml")], capture_output=True, text=True, check=False
    )
    assert (checked.returncode, checked.stderr) == (0, ""), checked.stdout


def test_each_alert_fires_when_it_should_and_only_then():
    tested = subprocess.run(
        [needed("promtool"), "test", "rules", "alerts_test.yaml"], cwd=HERE, capture_output=True, text=True, check=False
    )
    assert tested.returncode == 0, tested.stdout + tested.stderr


def test_each_alert_has_a_test_that_sees_it_fire():
    cases = [
        case
        for test in yaml.safe_load((HERE / "alerts_test.yaml").read_text())["tests"]
        for case in test.get("alert_rule_test", [])
    ]
    assert {case["alertname"] for case in cases if case.get("exp_alerts")} == {rule["alert"] for rule in ALERTS}


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_each_alert_leads_to_its_runbook(rule):
    assert set(rule["annotations"]) == {"summary", "description", "runbook_url"}
    assert rule["labels"]["severity"] in {"warning", "critical"}
    assert rule["annotations"]["runbook_url"] == f"{RUNBOOKS}#{rule['alert'].lower()}"
    assert f"\n## {rule['alert']}\n" in (ROOT / "docs/runbooks.md").read_text()


def test_the_runbooks_are_of_alerts_that_exist():
    sections = re.findall(r"^## (Topwork\w+)$", (ROOT / "docs/runbooks.md").read_text(), re.MULTILINE)
    assert sections == [rule["alert"] for rule in ALERTS]


@pytest.mark.parametrize("name", BOARDS)
def test_the_committed_dashboard_is_the_generated_one(name):
    """Also what `make verify` compares; here it says which."""
    spec = importlib.util.spec_from_file_location("dashboards", ROOT / "charts/dashboards.py")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "charts"))
        generated = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(generated)
        assert dict(generated.files())[f"dashboards/{name}"] == (FOLDER / name).read_text()


def test_the_configurations_of_the_docs_are_valid(tmp_path):
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/monitoring.md").read_text(), re.DOTALL)
    configs = [block for block in blocks if "scrape_configs" in block]
    assert len(configs) == 3
    for config in configs:
        # Debian builds Prometheus without the discovery of Kubernetes.
        known = config.replace("kubernetes_sd_configs: [{role: pod}]", "static_configs: [{targets: [localhost:9101]}]")
        (tmp_path / "prometheus.yml").write_text(known)
        checked = subprocess.run(
            [needed("promtool"), "check", "config", tmp_path / "prometheus.yml"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.parametrize("name", BOARDS)
def test_each_panel_has_a_description_a_unit_and_thresholds(name):
    for panel in panels(name):
        defaults = panel["fieldConfig"]["defaults"]
        assert panel["description"].endswith("."), panel["title"]
        assert defaults["unit"], panel["title"]
        assert defaults["thresholds"]["steps"][0]["value"] is None, panel["title"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}, panel["title"]


@pytest.mark.parametrize("name", BOARDS)
def test_the_panels_fill_whole_rows_and_none_covers_another(name):
    taken = [
        (panel["gridPos"]["x"] + column, panel["gridPos"]["y"] + line)
        for panel in board(name)["panels"]
        for column in range(panel["gridPos"]["w"])
        for line in range(panel["gridPos"]["h"])
    ]
    assert len(taken) == len(set(taken))
    lowest = max(line for _, line in taken)
    assert set(taken) == {(column, line) for column in range(24) for line in range(lowest + 1)}


def test_the_addresses_of_the_dashboards_stay():
    assert [board(name)["uid"] for name in BOARDS] == ["topwork-jobs", "topwork-job"]


def test_each_recorded_series_is_used():
    recorded = {
        rule["record"]
        for group in yaml.safe_load((RULES / "recording.yaml").read_text())["groups"]
        for rule in group["rules"]
    }
    texts = [asked.expr for asked in queries()] + [rule["expr"] for rule in ALERTS]
    texts += [(RULES / "recording.yaml").read_text().replace("record: ", "")]
    used = set(re.findall(r"topwork:\w+(?::\w+)?(?=[{\[\s)]|$)", "\n".join(texts)))
    assert recorded <= used
