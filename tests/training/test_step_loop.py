"""The step loop: the same steps as Keras' `fit`, and requests on which several nodes agree."""

from types import SimpleNamespace

import keras
import numpy as np
import pytest
import tensorflow as tf

from topwork.cancellation import StopRequest
from topwork.errors import Stopped, UnavailableError
from topwork.nodes.group import NodeGroup
from topwork.nodes.node import Node
from topwork.spec.optimizer import Optimizer
from topwork.training.distribution.lost_nodes import report_lost_nodes
from topwork.training.optimizers import make_optimizer
from topwork.training.train_step import StepRequests, make_step_function

STEPS, BATCH = 5, 4


def make_model(precision):
    keras.utils.set_random_seed(7)
    layers = [
        keras.Input((6,)),
        keras.layers.Dense(8, activation="relu", dtype=precision),
        keras.layers.BatchNormalization(dtype=precision),
        keras.layers.Dropout(0.3, dtype=precision),
        keras.layers.Dense(3, dtype="float32"),
    ]
    model = keras.Sequential(layers)
    optimizer = make_optimizer(
        Optimizer(name="adam", learning_rate=0.01, ema={"momentum": 0.9}),
        steps_per_epoch=STEPS,
        epochs=1,
        scale_loss=precision == "mixed_float16",
    )
    loss = keras.losses.CategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=optimizer, loss=loss, metrics=["accuracy"], jit_compile=False)
    optimizer.build(model.trainable_variables)
    return model


def make_batches():
    random = np.random.default_rng(1)
    shape = (STEPS * BATCH,)
    inputs = random.normal(size=(*shape, 6)).astype(np.float32)
    labels = np.eye(3, dtype=np.float32)[random.integers(0, 3, shape)]
    weights = random.uniform(0.5, 2.0, shape).astype(np.float32)
    return tf.data.Dataset.from_tensor_slices((inputs, labels, weights)).batch(BATCH, drop_remainder=True)


@pytest.mark.parametrize("precision", ["float32", "mixed_bfloat16", "mixed_float16"])
def test_steps_are_those_of_fit(precision):
    fitted, stepped = make_model(precision), make_model(precision)
    history = fitted.fit(make_batches(), epochs=1, shuffle=False, verbose=0).history
    step = make_step_function(stepped)
    losses = [float(step(batch, tf.zeros(0))[0]) for batch in make_batches()]
    stepped.optimizer.finalize_variable_values(stepped.trainable_weights)  # `fit` ends with the moving averages
    assert losses[-1] == history["loss"][0]
    assert {name: float(value) for name, value in stepped.get_metrics_result().items()} == {
        name: value for name, (value,) in history.items()
    }
    for one, two in zip(fitted.variables, stepped.variables, strict=True):
        np.testing.assert_array_equal(one.numpy(), two.numpy())
    for one, two in zip(fitted.optimizer.variables, stepped.optimizer.variables, strict=True):
        np.testing.assert_array_equal(one.numpy(), two.numpy())


class SimulatedNodes:
    """The nodes of a run in one process: the result of a step sums their requests."""

    def __init__(self, count):
        node = [Node(index, ("unused:1",) * count, "unused:2") for index in range(count)]
        self.trainers = [
            SimpleNamespace(
                workspace=SimpleNamespace(nodes=NodeGroup(node[index]), stop=StopRequest()),
                is_due=False,
            )
            for index in range(count)
        ]
        for trainer in self.trainers:
            trainer.checkpoint_is_due = lambda trainer=trainer: trainer.is_due
        self.requests = [StepRequests(trainer) for trainer in self.trainers]

    def step(self, *, is_last=False):
        result = tf.concat([[0.5], tf.add_n([requests.of_this_node() for requests in self.requests])], axis=0)
        decisions = {requests.of_all_nodes(result, is_last=is_last) for requests in self.requests}
        assert len(decisions) == 1, "the nodes disagree"
        return decisions.pop()


def request_stop(trainer):
    with pytest.raises(Stopped), trainer.workspace.stop.deferred():
        trainer.workspace.stop.set()


def test_stop_of_one_node_ends_all_nodes_after_the_next_step():
    nodes = SimulatedNodes(3)
    assert [nodes.step(), nodes.step()] == [(False, False)] * 2
    request_stop(nodes.trainers[2])
    assert nodes.step() == (False, False)
    assert nodes.step() == (True, False)


def test_checkpoint_is_due_if_the_chief_wants_it():
    nodes = SimulatedNodes(2)
    nodes.trainers[1].is_due = True
    assert [nodes.step() for _ in range(3)] == [(False, False)] * 3
    nodes.trainers[0].is_due = True
    assert nodes.step() == (False, False)
    assert nodes.step() == (False, True)


def test_stored_checkpoint_is_not_stored_again_after_the_next_step():
    nodes = SimulatedNodes(2)
    nodes.trainers[0].is_due = True
    nodes.step()
    assert nodes.step() == (False, True)
    # The step before the checkpoint was stored also requested one.
    nodes.trainers[0].is_due = False
    for requests in nodes.requests:
        requests.clear()
    assert [nodes.step() for _ in range(3)] == [(False, False)] * 3


def test_requests_before_the_last_step_of_an_epoch_are_left_to_its_end():
    nodes = SimulatedNodes(2)
    request_stop(nodes.trainers[1])
    nodes.step(is_last=True)
    # The end of the epoch stops the run; otherwise the next epoch starts without the requests of the last one.
    assert nodes.step() == (False, False)
    assert nodes.step() == (True, False)


def test_single_node_obeys_its_requests_at_once():
    nodes = SimulatedNodes(1)
    assert nodes.step() == (False, False)
    request_stop(nodes.trainers[0])
    assert nodes.step() == (True, False)


class LostPeer(NodeGroup):
    """A node whose peer has failed."""

    def __init__(self, failure):
        super().__init__(Node(0, ("unused:1", "unused:2"), "unused:3"))
        self._failure = failure

    def peer_failure(self):
        return self._failure


def fail_collective():
    raise tf.errors.UnavailableError(None, None, "Connection reset by peer\nAdditional GRPC error information")


@pytest.mark.parametrize("failure", [UnavailableError("Node 1 failed: disk full"), Stopped("Node 1 was stopped.")])
def test_failed_collective_operation_is_reported_with_the_failure_of_the_other_node(failure):
    with pytest.raises(type(failure)) as raised, report_lost_nodes(LostPeer(failure)):
        fail_collective()
    assert raised.value is failure


def test_failed_collective_operation_without_a_known_reason_is_retried():
    with pytest.raises(UnavailableError) as raised, report_lost_nodes(LostPeer(None)):
        fail_collective()
    assert str(raised.value) == (
        "Lost the connection to another node: Connection reset by peer. The checkpoint is kept: start the same job "
        "again to resume."
    )


def test_errors_of_tensorflow_on_a_single_node_are_not_converted():
    with pytest.raises(tf.errors.UnavailableError), report_lost_nodes(NodeGroup()):
        fail_collective()
