"""On which devices a container of the Job trains."""

import io
import json

import pytest
import tensorflow as tf

from topwork.errors import SettingError
from topwork.progress import LineProgress
from topwork.training.strategy import replicas_in_pod


@pytest.fixture
def node(monkeypatch):
    """Stand a build of TensorFlow on a node with some GPUs."""

    def stand(visible: int, *, cuda: bool) -> None:
        monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: ["GPU"] * visible)
        monkeypatch.setattr(tf.test, "is_built_with_cuda", lambda: cuda)
        monkeypatch.setattr(tf.sysconfig, "get_build_info", lambda: {"cuda_version": "12.5.1"} if cuda else {})

    return stand


def chosen(asked: int) -> tuple[int | None, list[dict[str, object]]]:
    stream = io.StringIO()
    replicas = replicas_in_pod(asked, LineProgress(stream, as_json=True))
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    return replicas, [{name: value for name, value in line.items() if name != "time"} for line in lines]


@pytest.mark.parametrize(("visible", "asked"), [(2, 2), (0, 0)])
def test_the_gpus_that_were_asked_for_are_used_without_a_word(node, visible, asked):
    node(visible, cuda=True)
    assert chosen(asked) == (None, [])


@pytest.mark.parametrize(("visible", "asked"), [(1, 2), (4, 2)])
def test_what_is_there_is_used_and_told(node, visible, asked):
    node(visible, cuda=True)
    assert chosen(asked) == (None, [{"message": "other GPUs than asked for", "asked": asked, "visible": visible}])


def test_no_gpu_where_gpus_could_be_used_is_an_error_that_says_where_to_look(node):
    node(0, cuda=True)
    with pytest.raises(SettingError) as raised:
        chosen(2)
    assert str(raised.value) == (
        "spec.compute.gpus asks for 2 GPUs, and TensorFlow sees none here. Look at the node's driver (nvidia-smi), at "
        "its device plugin (kubectl describe node: is nvidia.com/gpu allocatable?), at the RuntimeClass (nvidia, where "
        "it isn't the node's default) and at the image: its TensorFlow wants CUDA 12.5.1, and a driver that has it."
    )


def test_a_build_for_processors_stands_in_with_as_many_replicas(node):
    node(0, cuda=False)
    note = "no GPU can be used by this build of TensorFlow: replicas on the processor"
    assert chosen(3) == (3, [{"message": note, "replicas": 3}])
