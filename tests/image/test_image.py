"""What the image is made of."""

import json
import tomllib
from pathlib import Path

import pytest
from tests.image.engine import podman

import topwork

pytestmark = [pytest.mark.image, pytest.mark.timeout(1800)]

MOST_BYTES = 2.6e9
BUILD_TOOLS = ("gcc", "cc", "g++", "clang", "ld", "make", "uv", "git")
# Prints every module that Python had to compile anew at every start, since it can't keep the result.
UNCOMPILED = """
import importlib.util, pathlib, site, sysconfig
library = pathlib.Path(sysconfig.get_path("stdlib"))
own = [path for path in library.rglob("*.py") if "site-packages" not in path.parts]
for path in [*own, *(path for root in site.getsitepackages() for path in pathlib.Path(root).rglob("*.py"))]:
    if not pathlib.Path(importlib.util.cache_from_source(path)).exists():
        print(path)
"""


@pytest.fixture(scope="module")
def facts(image):
    (found,) = json.loads(podman("image", "inspect", image).stdout)
    return found


def test_the_image_says_what_it_is(facts):
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    labels = {name.rpartition(".")[2]: text for name, text in facts["Labels"].items() if "opencontainers" in name}
    assert len(labels.pop("revision").removesuffix("-dirty")) == 40
    assert labels == {
        "title": project["name"],
        "description": project["description"],
        "version": topwork.__version__,
        "licenses": project["license"],
        "source": "",
    }
    assert facts["Labels"]["dev.topwork.accelerator"] == "cpu"


def test_the_image_runs_topwork_below_tini_as_a_user_that_is_a_number(facts):
    config = facts["Config"]
    assert (config["User"], config["Entrypoint"], config["Cmd"]) == (
        "65532:65532",
        ["tini", "--", "topwork"],
        ["--help"],
    )


def test_the_image_is_not_larger_than_it_was(facts, capsys):
    with capsys.disabled():
        print(f" {facts['Size'] / 1e9:.2f} GB", end=" ")
    assert facts["Size"] < MOST_BYTES


def test_topwork_runs_on_a_read_only_root_without_any_mount(in_image):
    assert in_image("--version").stdout == f"topwork {topwork.__version__}\n"


def test_the_image_has_no_build_tools(in_image):
    found = in_image("-c", f"for tool in {' '.join(BUILD_TOOLS)}; do command -v $tool || true; done", program="sh")
    assert found.stdout == ""


def test_the_image_has_no_caches_and_no_lists_of_packages(in_image):
    folders = "/root/.cache /home/topwork /var/lib/apt/lists /var/cache/apt /tmp /var/tmp /source /package"
    found = in_image("-c", f"find {folders} -type f 2>/dev/null || true", program="sh")
    assert found.stdout == ""


def test_the_byte_code_of_every_module_is_there(in_image):
    assert in_image("-c", UNCOMPILED, program="python3").stdout == ""
