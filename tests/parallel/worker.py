"""One rank of the parallel tests: runs every check and prints, on the chief, one JSON object of their outcomes."""

import itertools
import json
import time
import traceback

import numpy as np
import pytest

from hvd_dqn.errors import InputError, RunError
from hvd_dqn.ranks.connect import connect
from hvd_dqn.ranks.lockstep import BroadcastHook, check_drift, in_step
from hvd_dqn.ranks.placement import FUSED_FLOATS, set_thread_defaults
from hvd_dqn.ranks.world import Solo

set_thread_defaults()
world = connect()
assert world.size == 2, f"expected 2 ranks, received {world.size}"

import tensorflow as tf  # noqa: E402

from hvd_dqn.agent.layout import single  # noqa: E402
from hvd_dqn.agent.learner import Learner  # noqa: E402
from hvd_dqn.agent.networks import build_network  # noqa: E402
from hvd_dqn.agent.objectives import Dqn  # noqa: E402
from hvd_dqn.agent.optimizer import Adam  # noqa: E402
from hvd_dqn.agent.preprocess import Preprocess  # noqa: E402
from hvd_dqn.agent.transition import Batch  # noqa: E402
from hvd_dqn.graphs import DenseTape, Graph  # noqa: E402
from hvd_dqn.ranks.world import largest_gradient  # noqa: E402

tf.get_logger().setLevel("ERROR")  # many learners in one process make TensorFlow warn about retracing
KERAS = "tests.unit.agent.test_networks:keras_model"


def make(in_world=world, seed=0, network="mlp", dueling=False, double=True, loss="huber", **settings) -> Learner:
    rng = np.random.default_rng(seed)
    preprocess, objective = Preprocess(single((4,))), Dqn(double=double, loss=loss)
    build = lambda: build_network(network, preprocess, 3, objective, hidden=(16, 8), dueling=dueling, rng=rng)  # noqa: E731
    return Learner(build, preprocess, objective, in_world, **settings)


def batch(updates, size, seed) -> Batch:
    rng = np.random.default_rng(seed)
    return Batch(
        rng.normal(size=(updates, size, 4)).astype(np.float32),
        rng.integers(3, size=(updates, size)),
        rng.normal(size=(updates, size)).astype(np.float32) * 3,
        rng.choice([0.0, 0.9], size=(updates, size)).astype(np.float32),
        rng.normal(size=(updates, size, 4)).astype(np.float32),
    )


def assert_equal_on_all_ranks(learner: Learner) -> None:
    everyone = world.gather(learner.state())
    for name, mine in everyone[0].items():
        theirs = everyone[1][name]
        assert np.array_equal(mine, theirs), f"{name} differs by {np.abs(mine - theirs).max()}"


def two_ranks_with_batch_32_are_one_with_batch_64(network, **settings):
    both = batch(3, 64, seed=1)
    mine = Batch(*(x[:, world.rank * 32 : (world.rank + 1) * 32] for x in both[:5]))
    copies = np.array([False, True, False])
    shared, alone = make(network=network, **settings), make(Solo(), network=network, **settings)
    phase, expected = shared.update(mine, 0.01, copies), alone.update(both, 0.01, copies)
    assert np.isclose(phase.gradient_norm, expected.gradient_norm, rtol=1e-4), (phase, expected)
    for one, other in zip(shared.variables.values(), alone.variables.values(), strict=True):
        np.testing.assert_allclose(one.numpy(), other.numpy(), rtol=2e-3, atol=1e-5)


def the_average_of_opposite_gradients_is_zero():
    """Clipping first would give each rank's gradient the same length, and Adam any gradient a step of the same size."""
    learner = make(double=False, loss="squared", max_gradient_norm=1e-3)
    data = batch(1, 16, seed=2)
    q = learner.online.q_values(data.observation[0])[np.arange(16), data.action[0]]
    away = {0: 1.0, 1: -1.0}[world.rank]
    data = data._replace(reward=(q + away)[None].astype(np.float32), discount=np.zeros((1, 16), np.float32))
    before = learner.online.variables[0].numpy()
    assert learner.update(data, 0.01, np.array([False])).gradient_norm < 1e-6
    # Adam takes whole steps on the sign of what is left by rounding, unless that is exactly zero.
    assert np.abs(learner.online.variables[0].numpy() - before).max() <= 0.011


def weights_stay_bit_equal(network, **settings):
    learner = make(seed=world.rank, network=network, max_gradient_norm=10.0, **settings)
    BroadcastHook(world, learner.variables)()
    before = learner.online.variables[0].numpy()
    for phase in range(5):
        copies = np.arange(20) % 7 == 0
        learner.update(batch(20, 8, seed=100 * phase + world.rank), 0.01, copies)  # different data on each rank
    assert not np.array_equal(learner.online.variables[0].numpy(), before)
    assert int(learner.optimizer.iterations.numpy()) == 100
    assert_equal_on_all_ranks(learner)
    check_drift(world, learner.variables, "in this test")


def fp16_is_on_the_wire_where_it_is_asked_for():
    """A gradient beyond 65,504, its largest number, does not arrive."""
    data = batch(1, 8, seed=3)
    data = data._replace(reward=np.full_like(data.reward, 1e7))
    for compression, skipped in (("none", 0), ("fp16", 1)):
        learner = make(loss="squared", compression=compression)
        assert learner.update(data, 0.01, np.array([False])).skipped == skipped, compression


def fp16_takes_gradients_up_to_its_largest_number_on_every_rank():
    """The sum of two ranks is above it, so they are divided before they are added."""
    weight = tf.Variable([0.0])
    adam = Adam([weight], epsilon=1e-7)
    averaging = world.wrap(adam, "fp16")

    def gradient(of: list[float]) -> tf.Tensor:
        with DenseTape() as tape:
            loss = of[world.rank] * tf.reduce_sum(weight)
        return averaging.compute_gradients(loss, [weight], tape)[0][0]

    assert largest_gradient(world.size) == 65_504
    #    of each rank, and their mean
    for of, mean in (([60_000.0, 60_000.0], 60_000.0), ([65_504.0, 65_504.0], 65_504.0), ([-8.0, 2.0], -3.0)):
        graph = Graph(lambda of=of: [gradient(of)])
        assert graph()[0][0] == mean, (of, graph()[0])


def large_tensors_are_sent_alone_and_all_come_back_in_their_places():
    sizes = (3, FUSED_FLOATS + 1, 0, FUSED_FLOATS, FUSED_FLOATS + 2)
    mine = [tf.fill([size], float(index + world.rank)) for index, size in enumerate(sizes)]
    average = tf.function(lambda: world.average(mine)).get_concrete_function()
    for index, (size, values) in enumerate(zip(sizes, average(), strict=True)):
        np.testing.assert_array_equal(values, np.full(size, index + 0.5))
    # Each waits for the one before: what Horovod finds ready at the same time it would send together.
    messages = [op for op in average.graph.get_operations() if "Allreduce" in op.type]
    assert [len(message.inputs) for message in messages] == [1, 1, 3]
    for message, before in zip(messages[1:], messages, strict=False):
        assert waits_for(message, before), f"{message.name} does not wait for {before.name}"


def waits_for(op: tf.Operation, other: tf.Operation) -> bool:
    needed = [*op.control_inputs, *(tensor.op for tensor in op.inputs)]
    return other in needed or any(waits_for(each, other) for each in needed)


def parameters_become_the_mean_of_ranks_that_learn_alone():
    shared = make(sync="parameters")
    data, copies = batch(4, 8, seed=world.rank), np.array([False, False, True, False])
    alone = make(Solo())
    alone.update(data, 0.01, np.zeros(4, bool))
    shared.update(data, 0.01, copies)
    expected = np.mean(world.gather(alone.online.variables[0].numpy()), axis=0)
    np.testing.assert_allclose(shared.online.variables[0].numpy(), expected, rtol=1e-5, atol=1e-6)
    # A copy that fell inside the phase happens after the average, so that the target is equal too.
    assert np.array_equal(shared.target.variables[0].numpy(), shared.online.variables[0].numpy())


def all_ranks_know_that_one_skipped_an_update(sync):
    learner, data, copies = make(sync=sync), batch(4, 8, seed=world.rank), np.zeros(4, bool)
    assert not learner.update(data, 0.01, copies).any_skipped
    if world.rank == 1:
        data.reward[2, 0] = np.inf
    phase = learner.update(data, 0.01, copies)
    assert phase.any_skipped
    assert phase.nonfinite == world.rank
    assert phase.skipped == (world.rank if sync == "parameters" else 1)


def the_broadcast_hook_gives_all_ranks_the_chiefs_weights():
    learner = make(seed=world.rank)
    learner.update(batch(2, 8, seed=world.rank), 0.01, np.array([True, False]))
    chiefs = world.gather(learner.state())[0]
    BroadcastHook(world, learner.variables)()
    assert all(np.array_equal(array, chiefs[name]) for name, array in learner.state().items())


def the_drift_check_names_the_rank_and_the_variable():
    learner = make()
    check_drift(world, learner.variables, "before")
    if world.rank == 1:
        theta = learner.target.variables[0].numpy()
        theta[7] += 1e-6
        learner.target.variables[0].assign(theta)
    with pytest.raises(RunError, match=r"after 100 total steps: on rank 1 the variables target/0 \(theta:0\)"):
        check_drift(world, learner.variables, "after 100 total steps")


def an_exchange_lasts_until_the_last_rank_is_there(**settings):
    learner, nothing = make(**settings), np.zeros(2, bool)
    learner.update(batch(2, 8, seed=0), 0.01, nothing)  # traced
    world.barrier()
    time.sleep(2 * world.rank)
    phase = learner.update(batch(2, 8, seed=0), 0.01, nothing)
    first, last = world.gather(phase.allreduce_seconds)
    assert first > 1, (first, last)
    assert 0 < last < first
    assert phase.allreduce_seconds < phase.seconds


def values_are_reduced():
    assert world.sum(np.array([1.0, float(world.rank)])).tolist() == [2.0, 1.0]
    assert world.max(np.array([-np.inf, -float(world.rank)])).tolist() == [-np.inf, 0.0]
    assert world.any(world.rank == 1)
    assert not world.any(False)
    assert world.gather({"rank": world.rank}) == [{"rank": 0}, {"rank": 1}]


def bad_input_of_one_rank_is_raised_on_all():
    def action():
        if world.rank == 1:
            raise InputError("no such thing on rank 1")
        return 5

    with pytest.raises(InputError, match="no such thing on rank 1"):
        in_step(world, action)
    assert in_step(world, lambda: world.rank) == world.rank


def checks():
    yield "values are reduced", values_are_reduced
    yield "bad input of one rank is raised on all", bad_input_of_one_rank_is_raised_on_all
    yield "broadcast", the_broadcast_hook_gives_all_ranks_the_chiefs_weights
    yield "drift", the_drift_check_names_the_rank_and_the_variable
    yield "average before clip", the_average_of_opposite_gradients_is_zero
    yield "fp16", fp16_is_on_the_wire_where_it_is_asked_for
    yield "fp16 takes gradients up to its largest number", fp16_takes_gradients_up_to_its_largest_number_on_every_rank
    yield "large tensors are sent alone", large_tensors_are_sent_alone_and_all_come_back_in_their_places
    yield "parameters are averaged", parameters_become_the_mean_of_ranks_that_learn_alone
    for sync in ("gradients", "parameters"):
        yield f"all know of a skipped update, {sync}", lambda s=sync: all_ranks_know_that_one_skipped_an_update(s)
    for settings in ({"sync": "gradients"}, {"sync": "parameters"}, {"passes": 2}):
        yield f"exchange, {settings}", lambda s=settings: an_exchange_lasts_until_the_last_rank_is_there(**s)
    for network in ("mlp", KERAS):
        for norm in (None, 0.05):
            yield (
                f"batch 2x32 = 64, {network}, clip {norm}",
                lambda n=network, c=norm: two_ranks_with_batch_32_are_one_with_batch_64(n, max_gradient_norm=c),
            )
    yield "batch 2x32 = 64, passes", lambda: two_ranks_with_batch_32_are_one_with_batch_64("mlp", passes=2)
    combinations = itertools.product((False, True), (False, True), ("none", "fp16"), ("gradients", "parameters"))
    for double, dueling, compression, sync in combinations:
        settings = {"double": double, "dueling": dueling, "compression": compression, "sync": sync}
        yield f"equal weights, mlp, {settings}", lambda s=settings: weights_stay_bit_equal("mlp", **s)
    for compression, sync in itertools.product(("none", "fp16"), ("gradients", "parameters")):
        settings = {"compression": compression, "sync": sync}
        yield f"equal weights, keras, {settings}", lambda s=settings: weights_stay_bit_equal(KERAS, **s)


def main() -> None:
    outcomes = {}
    for name, check in checks():
        try:
            check()
            outcome = None
        except Exception:  # the others go on: each check is a test of its own
            outcome = traceback.format_exc()
        failures = [text for text in world.gather(outcome) if text]
        outcomes[name] = failures[0] if failures else "passed"
    if world.rank == 0:
        print("\n@@@" + json.dumps(outcomes) + "@@@", flush=True)


main()
