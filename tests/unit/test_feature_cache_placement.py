"""Where cached features are placed: free memory of the machine and its cgroups, and free space on scratch."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from topwork.spec import TransferJob
from topwork.training.feature_cache import placement
from topwork.training.feature_cache.placement import allocate, available_memory, choose_placement

MIB = 2**20
V1, V2 = "sys/fs/cgroup/memory", "sys/fs/cgroup"


@pytest.fixture
def machine(tmp_path: Path) -> Callable[..., Path]:
    """Write the files of a machine with 8,000 MiB of available memory; returns its root directory."""

    def write(files: dict[str, str], *, cgroup: str = "") -> Path:
        all_files = {"proc/meminfo": f"MemTotal: 9 kB\nMemAvailable: {8000 * 1024} kB\n", "proc/self/cgroup": cgroup}
        for name, text in (all_files | files).items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        return tmp_path

    return write


def v2_files(directory: str, limit: str, usage_mib: int, cache_mib: int) -> dict[str, str]:
    return {
        f"{directory}/memory.max": f"{limit}\n",
        f"{directory}/memory.current": f"{usage_mib * MIB}\n",
        f"{directory}/memory.stat": (
            f"anon {MIB}\nfile {cache_mib * MIB}\nactive_file 0\ninactive_file {cache_mib * MIB}\nshmem 0\n"
        ),
    }


def v1_files(directory: str, limit: int, usage_mib: int, cache_mib: int) -> dict[str, str]:
    return {
        f"{directory}/memory.limit_in_bytes": f"{limit}\n",
        f"{directory}/memory.usage_in_bytes": f"{usage_mib * MIB}\n",
        # The values without the prefix exclude child cgroups.
        f"{directory}/memory.stat": f"cache 0\ninactive_file 0\ntotal_inactive_file {cache_mib * MIB}\n",
    }


def test_page_cache_of_a_container_counts_as_free_memory(machine):
    root = machine(v2_files(V2, str(4000 * MIB), usage_mib=3900, cache_mib=3500), cgroup="0::/\n")
    assert available_memory(root) == 3600 * MIB


def test_page_cache_of_a_container_with_cgroups_of_version_1_counts_as_free_memory(machine):
    cgroup = "5:cpu,cpuacct:/kubepods/x\n4:memory:/kubepods/x\n1:name=systemd:/\n"
    root = machine(v1_files(V1, 4000 * MIB, usage_mib=3900, cache_mib=3500), cgroup=cgroup)
    assert available_memory(root) == 3600 * MIB


def test_anonymous_memory_and_tmpfs_files_count_as_used(machine):
    root = machine(v2_files(V2, str(4000 * MIB), usage_mib=3900, cache_mib=0), cgroup="0::/\n")
    assert available_memory(root) == 100 * MIB


@pytest.mark.parametrize("name", ["max", str(2**63 - 4096)])
def test_cgroup_without_a_limit_is_limited_by_the_machine(machine, name):
    assert available_memory(machine(v2_files(V2, name, usage_mib=10, cache_mib=0))) == 8000 * MIB


def test_limit_of_an_outer_cgroup_applies(machine):
    """A systemd service or a pod: the limit is not that of the innermost cgroup."""
    files = v2_files(f"{V2}/pod/container", "max", 100, 0) | v2_files(f"{V2}/pod", str(2000 * MIB), 1500, 1000)
    assert available_memory(machine(files, cgroup="0::/pod/container\n")) == 1500 * MIB
    files = v1_files(f"{V1}/pod/container", 2**63 - 4096, 100, 0) | v1_files(f"{V1}/pod", 1000 * MIB, 500, 400)
    assert available_memory(machine(files, cgroup="0::/\n4:memory:/pod/container\n")) == 900 * MIB


def test_memory_beyond_the_limit_counts_as_0(machine):
    assert available_memory(machine(v2_files(V2, str(100 * MIB), usage_mib=200, cache_mib=0))) == 0


def test_missing_statistics_count_all_usage(machine):
    files = v2_files(V2, str(100 * MIB), usage_mib=60, cache_mib=50)
    assert available_memory(machine(files | {f"{V2}/memory.stat": "unknown"})) == 40 * MIB
    assert available_memory(Path("/nonexistent")) == 0


def test_this_machine_has_memory():
    assert 0 < available_memory() < 2**50


@pytest.fixture
def job() -> TransferJob:
    """A job with the default size of scratch."""
    spec = {
        "storage": "s3://bucket",
        "dataset": {
            "source": {"folder": {"uri": "/photos"}},
            "splits": {"train": "train[:80%]", "test": "train[80%:]"},
            "imageSize": [32, 32],
        },
        "model": {"base": {"cnn": {"filters": [2]}}},
        "transfer": {"train": "all", "epochs": 1, "batchSize": 2},
        "compute": {"gpus": 0},
    }
    metadata = {"apiVersion": "topwork.dev/v1alpha1", "kind": "TransferJob", "metadata": {"name": "tiny"}}
    return TransferJob.model_validate({**metadata, "spec": spec})


def test_features_replace_a_file_that_is_still_mapped(tmp_path, job, monkeypatch):
    monkeypatch.setattr(placement, "MEMORY_SHARE", 0.0)
    assert choose_placement(MIB, tmp_path, job) == "scratch"
    old = allocate(tmp_path / "features-train.bin", (1000,), np.dtype(np.float32), "scratch")
    old[:] = 7
    new = allocate(tmp_path / "features-train.bin", (10,), np.dtype(np.float32), "scratch")
    new[:] = 1
    assert old.sum() == 7000  # a truncated file would kill the process here
