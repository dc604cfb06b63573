"""Content and metadata of the image."""

import json
import tomllib
from pathlib import Path

import pytest
from tests.image.podman import run_podman

import topwork

pytestmark = [pytest.mark.image, pytest.mark.timeout(1800)]

MAX_BYTES = 2.6e9
BUILD_TOOLS = ("gcc", "cc", "g++", "clang", "ld", "make", "uv", "git")
# Prints all modules without bytecode. On a read-only file system, Python would compile them again at each start.
PRINT_UNCOMPILED = """
import importlib.util, pathlib, site, sysconfig
library = pathlib.Path(sysconfig.get_path("stdlib"))
standard = [path for path in library.rglob("*.py") if "site-packages" not in path.parts]
for path in [*standard, *(path for root in site.getsitepackages() for path in pathlib.Path(root).rglob("*.py"))]:
    if not pathlib.Path(importlib.util.cache_from_source(path)).exists():
        print(path)
"""


@pytest.fixture(scope="module")
def metadata(image):
    (metadata,) = json.loads(run_podman("image", "inspect", image).stdout)
    return metadata


def test_image_has_opencontainers_labels(metadata):
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    labels = {name.rpartition(".")[2]: text for name, text in metadata["Labels"].items() if "opencontainers" in name}
    assert len(labels.pop("revision").removesuffix("-dirty")) == 40
    assert labels == {
        "title": project["name"],
        "description": project["description"],
        "version": topwork.__version__,
        "licenses": project["license"],
        "source": "",
    }
    assert metadata["Labels"]["dev.topwork.accelerator"] == "cpu"


def test_image_runs_topwork_under_tini_as_a_numeric_user(metadata):
    config = metadata["Config"]
    assert (config["User"], config["Entrypoint"], config["Cmd"]) == (
        "65532:65532",
        ["tini", "--", "topwork"],
        ["--help"],
    )


def test_image_size_is_below_its_limit(metadata, capsys):
    with capsys.disabled():
        print(f" {metadata['Size'] / 1e9:.2f} GB", end=" ")
    assert metadata["Size"] < MAX_BYTES


def test_topwork_runs_on_a_read_only_root_without_mounts(in_image):
    assert in_image("--version").stdout == f"topwork {topwork.__version__}\n"


def test_image_has_no_build_tools(in_image):
    result = in_image("-c", f"for tool in {' '.join(BUILD_TOOLS)}; do command -v $tool || true; done", program="sh")
    assert result.stdout == ""


def test_image_has_no_caches_or_package_lists(in_image):
    directories = "/root/.cache /home/topwork /var/lib/apt/lists /var/cache/apt /tmp /var/tmp /source /package"
    result = in_image("-c", f"find {directories} -type f 2>/dev/null || true", program="sh")
    assert result.stdout == ""


def test_image_has_bytecode_of_all_modules(in_image):
    assert in_image("-c", PRINT_UNCOMPILED, program="python3").stdout == ""
