"""`topwork backbones` as a user calls it."""

import json
import subprocess
import sys

from topwork.spec.applications import APPLICATIONS


def call(*arguments: str, before: str = "") -> str:
    words = ["topwork", "backbones", *arguments]
    script = f"import sys\n{before}\nsys.argv = {words}\nfrom topwork.cli import main\nmain()"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    return ended.stdout


def test_backbones_prints_a_table_that_fits_a_terminal() -> None:
    header, *rows = call().splitlines()
    assert header == "model             input min  parameters without top depth   MB top-1 top-5"
    assert [row.split()[0] for row in rows] == list(APPLICATIONS)
    by_name = {row.split()[0]: row.split()[1:] for row in rows}
    assert by_name["Xception"] == ["299", "71", "22,910,480", "20,861,480", "81", "88", "79.0%", "94.5%"]
    assert by_name["MobileNetV3Small"] == ["224", "32", "2,554,968", "939,120", "88", "10", "68.1%", "-"]
    assert all(len(line) <= 80 for line in (header, *rows))


def test_backbones_json_has_the_same_content() -> None:
    found = {one["name"]: one for one in json.loads(call("--json"))}
    assert list(found) == list(APPLICATIONS)
    assert found["ConvNeXtXLarge"] == {
        "name": "ConvNeXtXLarge",
        "defaultSide": 224,
        "leastSide": 32,
        "scaling": "inside",
        "parameters": 350_196_968,
        "parametersWithoutTop": 348_147_968,
        "depth": 190,
        "sizeMB": 1310,
        "top1": 0.867,
        "top5": None,
    }


def test_backbones_imports_no_training_library() -> None:
    missing = "for name in ('numpy', 'tensorflow', 'keras'): sys.modules[name] = None"
    assert len(call(before=missing).splitlines()) == 41
