"""The strategy of a process, the replicas of a pod, and the dtype policy."""

import socket
import subprocess
import sys

import pytest
import tensorflow as tf
from structlog.testing import capture_logs

from topwork.errors import SettingError, UnavailableError
from topwork.training.distribution import strategy
from topwork.training.distribution.strategy import (
    choose_dtype_policy,
    choose_pod_replicas,
    cpu_supports_bfloat16,
    get_strategy,
)


def test_process_has_one_strategy():
    assert get_strategy(None) is get_strategy(1)
    with pytest.raises(SettingError, match="trains on 1 replicas and cannot also train on 2"):
        get_strategy(2)


@pytest.fixture
def simulate_gpus(monkeypatch):
    """Simulate a number of visible GPUs, and a TensorFlow that was built with or without CUDA."""

    def simulate(visible: int, *, cuda: bool) -> None:
        monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: ["GPU"] * visible)
        monkeypatch.setattr(tf.test, "is_built_with_cuda", lambda: cuda)
        monkeypatch.setattr(tf.sysconfig, "get_build_info", lambda: {"cuda_version": "12.5.1"} if cuda else {})

    return simulate


@pytest.mark.parametrize(("visible", "requested"), [(2, 2), (0, 0)])
def test_pod_replicas_follow_the_spec_silently_if_its_gpus_are_visible(simulate_gpus, visible, requested):
    simulate_gpus(visible, cuda=True)
    with capture_logs() as events:
        assert choose_pod_replicas(requested) is None
    assert events == []


@pytest.mark.parametrize(("visible", "requested"), [(1, 2), (4, 2)])
def test_pod_replicas_follow_the_visible_gpus_with_a_warning(simulate_gpus, visible, requested):
    simulate_gpus(visible, cuda=True)
    with capture_logs() as events:
        assert choose_pod_replicas(requested) is None
    assert events == [
        {
            "event": "GPU count differs from spec",
            "log_level": "warning",
            "requested": requested,
            "visible": visible,
        }
    ]


def test_pod_without_visible_gpus_is_an_error_that_lists_what_to_check(simulate_gpus):
    simulate_gpus(0, cuda=True)
    with pytest.raises(UnavailableError) as raised:
        choose_pod_replicas(2)
    assert str(raised.value) == (
        "spec.compute.gpus requests 2 GPUs, but TensorFlow detects none. Another node may have them. If this happens "
        "again, check the node's driver (nvidia-smi), its device plugin (kubectl describe node: is nvidia.com/gpu "
        "allocatable?), the RuntimeClass (nvidia, if it is not the node's default) and the image: its TensorFlow "
        "requires CUDA 12.5.1 and a driver that supports it."
    )


@pytest.mark.parametrize("visible_devices", ["0", "0,1", "GPU-8932f937", "MIG-1", None])
def test_pod_without_visible_gpus_is_retried_on_another_node(simulate_gpus, visible_devices):
    simulate_gpus(0, cuda=True)
    with pytest.raises(UnavailableError) as raised:
        choose_pod_replicas(1, visible_devices)
    assert raised.value.exit_code == 75


@pytest.mark.parametrize("visible_devices", ["", "-1", "-1,0", " "])
def test_pod_whose_environment_hides_the_gpus_is_not_retried(simulate_gpus, visible_devices):
    simulate_gpus(0, cuda=True)
    with pytest.raises(SettingError, match=r"hides all GPUs: CUDA_VISIBLE_DEVICES is '") as raised:
        choose_pod_replicas(1, visible_devices)
    assert raised.value.exit_code == 2


def test_pod_without_cuda_uses_as_many_cpu_replicas(simulate_gpus):
    simulate_gpus(0, cuda=False)
    with capture_logs() as events:
        assert choose_pod_replicas(3) == 3
    assert events == [
        {
            "event": "using CPU replicas instead of GPUs",
            "log_level": "warning",
            "replicas": 3,
            "reason": "this build of TensorFlow does not support CUDA",
        }
    ]


@pytest.mark.parametrize(
    ("supported", "multiplications", "expected"),
    [(True, 2e9, "mixed_bfloat16"), (True, 1e8, "float32"), (False, 2e9, "float32")],
)
def test_auto_precision_depends_on_cpu_and_model_size(monkeypatch, supported, multiplications, expected):
    monkeypatch.setattr(strategy, "cpu_supports_bfloat16", lambda: supported)
    assert choose_dtype_policy("auto", multiplications) == expected


def test_named_precision_is_used_unchanged():
    assert choose_dtype_policy("float32", 2e9) == "float32"
    assert choose_dtype_policy("mixed_float16", 0.0) == "mixed_float16"


def test_bfloat16_support_is_read_from_the_cpu_flags(tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    assert not cpu_supports_bfloat16(cpuinfo)
    for flags, expected in (("fpu avx512_bf16 amx_tile", True), ("fpu avx512f avx512_bf16x", False)):
        cpuinfo.write_text(f"processor : 0\nmodel name : amx_bf16\nflags\t\t: {flags}\n")
        assert cpu_supports_bfloat16(cpuinfo) is expected


CONNECT = """
import sys
from topwork.errors import UnavailableError
from topwork.nodes.group import NodeGroup
from topwork.nodes.node import Node
from topwork.training.distribution.strategy import get_strategy

try:
    get_strategy(1, NodeGroup(Node(0, (sys.argv[1], "127.0.0.1:1"))))
except UnavailableError as error:
    print(error)
"""


def test_a_node_whose_port_is_in_use_is_reported():
    with socket.create_server(("127.0.0.1", 0)) as occupied:
        address = f"127.0.0.1:{occupied.getsockname()[1]}"
        ended = subprocess.run(
            [sys.executable, "-c", CONNECT, address], capture_output=True, text=True, check=True, timeout=300
        )
    assert ended.stdout.startswith(f"TensorFlow could not connect node 0 at {address} to the others: ")
    assert "Another process may use its port" in ended.stdout
