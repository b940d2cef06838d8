"""The learner against a plain reimplementation of its update, alone and without Horovod."""

import numpy as np
import pytest
import tensorflow as tf

from hvd_dqn.agent.layout import single
from hvd_dqn.agent.learner import AHEAD_BYTES, Learner, Phase, _ends
from hvd_dqn.agent.networks import build_network
from hvd_dqn.agent.objectives import Dqn
from hvd_dqn.agent.preprocess import Preprocess
from hvd_dqn.agent.transition import Batch
from hvd_dqn.ranks.world import Solo


def make(
    hidden=(16,),
    seed=0,
    network="mlp",
    dueling=False,
    double=True,
    loss="huber",
    objective=None,
    world=None,
    **settings,
) -> Learner:
    rng = np.random.default_rng(seed)
    preprocess, objective = Preprocess(single((4,))), objective or Dqn(double=double, loss=loss)
    build = lambda: build_network(network, preprocess, 3, objective, hidden=hidden, dueling=dueling, rng=rng)  # noqa: E731
    return Learner(build, preprocess, objective, world or Solo(), **settings)


def batch(updates, size, seed=0) -> Batch:
    rng = np.random.default_rng(seed)
    return Batch(
        rng.normal(size=(updates, size, 4)).astype(np.float32),
        rng.integers(3, size=(updates, size)),
        rng.normal(size=(updates, size)).astype(np.float32),
        rng.choice([0.0, 0.9], size=(updates, size)).astype(np.float32),
        rng.normal(size=(updates, size, 4)).astype(np.float32),
    )


def sums(phase: Phase) -> tuple[float, ...]:
    """All of it but its times."""
    return phase._replace(seconds=0.0, allreduce_seconds=0.0, priority=0.0)


def reference(learner: Learner, b: Batch, k: int, double: bool, huber: bool) -> tuple[np.ndarray, float, float]:
    """The gradient, loss and mean q by arithmetic of our own: NumPy targets, TensorFlow only for the derivative of q."""
    online_next, target_next = (
        learner.online.q_values(b.next_observation[k]),
        learner.target.q_values(b.next_observation[k]),
    )
    best = (online_next if double else target_next).argmax(axis=1)
    y = b.reward[k] + b.discount[k] * target_next[np.arange(len(best)), best]
    with tf.GradientTape() as tape:
        q = tf.gather(learner.online(tf.constant(b.observation[k])), b.action[k], axis=1, batch_dims=1)
    error = q.numpy() - y
    slope = np.clip(error, -1, 1) if huber else error
    gradient = tape.gradient(q, learner.online.variables[0], output_gradients=tf.constant(slope / len(slope)))
    small = 0.5 * error**2
    loss = np.where(np.abs(error) <= 1, small, np.abs(error) - 0.5) if huber else small
    return gradient.numpy(), loss.mean(), q.numpy().mean()


def adam(theta, gradients, rate, clip, epsilon):
    """Kingma & Ba 2015, Algorithm 1, with epsilon as Keras places it."""
    m = v = np.zeros_like(theta)
    for t, g in enumerate(gradients, 1):
        g = g * min(1.0, clip / np.linalg.norm(g))
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        theta = theta - rate * np.sqrt(1 - 0.999**t) / (1 - 0.9**t) * m / (np.sqrt(v) + epsilon)
    return theta


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize(("loss", "epsilon"), [("huber", 1e-7), ("squared", 1e-7), ("huber", 1e-2)])
def test_one_update_is_the_papers(double, loss, epsilon):
    learner = make(double=double, loss=loss, max_gradient_norm=0.05, adam_epsilon=epsilon)
    b = batch(1, 32)
    before = learner.online.variables[0].numpy()
    gradient, expected_loss, expected_q = reference(learner, b, 0, double, loss == "huber")
    phase = learner.update(b, 0.01, np.array([False]))
    assert phase.gradient_norm == pytest.approx(np.linalg.norm(gradient), rel=1e-4)  # before clipping
    assert (phase.loss, phase.mean_q) == pytest.approx((expected_loss, expected_q), rel=1e-4)
    expected = adam(before, [gradient], 0.01, 0.05, epsilon)
    np.testing.assert_allclose(learner.online.variables[0].numpy(), expected, rtol=1e-4, atol=1e-5)


def test_k_updates_in_one_call_are_k_calls():
    together, apart = make(), make()
    b, copies = batch(6, 8), np.array([False, True, False, False, True, False])
    together.update(b, 0.01, copies)
    for k in range(6):
        apart.update(Batch(*(x[k : k + 1] for x in b[:5])), 0.01, copies[k : k + 1])
    for one, other in zip(together.variables.values(), apart.variables.values(), strict=True):
        np.testing.assert_allclose(one.numpy(), other.numpy(), rtol=1e-5, atol=1e-6)


def test_the_target_moves_only_when_it_is_copied():
    learner = make()
    before = learner.target.variables[0].numpy()
    learner.update(batch(3, 8), 0.01, np.array([False, False, False]))
    assert np.array_equal(learner.target.variables[0].numpy(), before)
    learner.update(batch(3, 8), 0.01, np.array([False, True, False]))
    target, online = learner.target.variables[0].numpy(), learner.online.variables[0].numpy()
    assert not np.array_equal(target, before)
    assert not np.array_equal(target, online)  # one more update came after the copy
    learner.update(batch(1, 8), 0.01, np.array([True]))
    assert np.array_equal(learner.target.variables[0].numpy(), learner.online.variables[0].numpy())


def test_online_and_target_start_equal():
    learner = make()
    assert np.array_equal(learner.online.variables[0].numpy(), learner.target.variables[0].numpy())


def test_two_passes_of_half_the_batch_are_one_of_the_whole():
    whole, halves = make(max_gradient_norm=0.1), make(max_gradient_norm=0.1, passes=2)
    b, copies = batch(5, 16), np.array([False, True, False, False, True])
    one, two = whole.update(b, 0.01, copies), halves.update(b, 0.01, copies)
    assert sums(two) == pytest.approx(sums(one), rel=1e-4)
    for a, c in zip(whole.variables.values(), halves.variables.values(), strict=True):
        np.testing.assert_allclose(a.numpy(), c.numpy(), rtol=1e-4, atol=1e-5)


def test_xla_computes_the_same():
    plain, compiled = make(), make(xla=True)
    assert compiled.compiled
    b, copies = batch(4, 16), np.array([False, True, False, False])
    assert sums(compiled.update(b, 0.01, copies)) == pytest.approx(sums(plain.update(b, 0.01, copies)), rel=1e-4)
    for one, other in zip(plain.variables.values(), compiled.variables.values(), strict=True):
        np.testing.assert_allclose(one.numpy(), other.numpy(), rtol=1e-4, atol=1e-5)


def test_small_networks_in_long_runs_are_compiled_where_nobody_talks():
    assert make(xla=None, planned=50_000).compiled
    assert not make(xla=None, planned=49_999).compiled
    assert not make(xla=None, planned=50_000, hidden=(256, 256)).compiled
    assert not make(xla=None, planned=50_000, network="tests.unit.agent.test_networks:keras_model").compiled
    assert make(xla=True, hidden=(256, 256)).compiled
    assert not make(xla=False, planned=50_000).compiled
    two, elastic = Solo(), Solo()
    two.size, elastic.elastic = 2, True
    assert not make(xla=True, world=two).compiled
    assert make(xla=True, world=two, sync="parameters").compiled
    assert not make(xla=True, world=elastic).compiled  # others may join


@pytest.mark.parametrize(
    ("copies", "at_once", "ends"),
    [
        ("....", 9, [4]),
        ("..*.", 9, [3, 4]),
        ("..**", 9, [3, 4]),
        ("*.....", 2, [1, 3, 5, 6]),
        ("....*..", 3, [3, 5, 7]),
        ("...", 1, [1, 2, 3]),
    ],
)
def test_the_target_values_ahead_until_its_next_copy(copies, at_once, ends):
    found = _ends(np.array([c == "*" for c in copies]), AHEAD_BYTES // at_once)
    assert found.tolist() == ends


@pytest.mark.parametrize("passes", [1, 2])
def test_valuing_ahead_changes_nothing(passes, monkeypatch):
    ahead = make(passes=passes)
    b, copies = batch(9, 8), np.array([c == "*" for c in "..*...**."])
    one = ahead.update(b, 0.01, copies)
    monkeypatch.setattr("hvd_dqn.agent.learner.AHEAD_BYTES", 1)
    each = make(passes=passes)
    assert sums(each.update(b, 0.01, copies)) == pytest.approx(sums(one), rel=1e-5)
    for one, other in zip(ahead.variables.values(), each.variables.values(), strict=True):
        np.testing.assert_allclose(one.numpy(), other.numpy(), rtol=1e-5, atol=1e-6)


def test_an_embedding_is_learned_like_anything_else_in_one_pass_and_in_two():
    learners = [
        make(network="tests.unit.agent.test_networks:keras_model_with_embedding", passes=passes, max_gradient_norm=0.01)
        for passes in (1, 2)
    ]
    phases = [learner.update(batch(1, 16), 0.01, np.array([False])) for learner in learners]
    assert sums(phases[0]) == pytest.approx(sums(phases[1]), rel=1e-5)
    for one, other in zip(*(learner.online.variables for learner in learners), strict=True):
        np.testing.assert_allclose(one.numpy(), other.numpy(), rtol=1e-4, atol=1e-5)


def test_averaging_parameters_alone_changes_nothing():
    gradients, parameters = make(), make(sync="parameters")
    b, copies = batch(4, 16), np.array([False, False, False, True])
    gradients.update(b, 0.01, copies)
    parameters.update(b, 0.01, copies)
    for one, other in zip(gradients.variables.values(), parameters.variables.values(), strict=True):
        assert np.array_equal(one.numpy(), other.numpy())


@pytest.mark.parametrize("network", ["mlp", "tests.unit.agent.test_networks:keras_model"])
def test_a_saved_state_goes_on_exactly(network):
    first, second = make(network=network), make(network=network, seed=9)
    first.update(batch(3, 8), 0.01, np.array([False, True, False]))
    second.load_state(first.state())
    for learner in (first, second):
        learner.update(batch(3, 8, seed=5), 0.01, np.array([False, True, False]))
    for one, other in zip(first.variables.values(), second.variables.values(), strict=True):
        assert np.array_equal(one.numpy(), other.numpy())


def test_a_state_of_another_shape_is_refused_and_changes_nothing():
    learner, other = make(), make(hidden=(17,))
    before = learner.state()
    with pytest.raises(ValueError, match="expected arrays of shapes"):
        learner.load_state(other.state())
    assert all(np.array_equal(before[name], array) for name, array in learner.state().items())


def test_acting_keeps_the_weights_of_the_last_sync():
    learner, observation = make(overlap=True), np.ones((2, 4), np.float32)
    assert np.array_equal(learner.acting.q_values(observation), learner.online.q_values(observation))
    before = learner.online.q_values(observation)
    learner.update(batch(3, 8), 0.01, np.zeros(3, bool))
    assert np.array_equal(learner.acting.q_values(observation), before)
    assert not np.allclose(learner.online.q_values(observation), before)
    learner.sync_acting_weights()
    assert np.array_equal(learner.acting.q_values(observation), learner.online.q_values(observation))


@pytest.mark.parametrize("now", [False, True])
def test_a_state_can_be_taken_over_by_a_learner_that_overlaps_and_by_one_that_does_not(now):
    before, after = make(overlap=not now), make(overlap=now, seed=9)
    before.update(batch(3, 8), 0.01, np.zeros(3, bool))
    after.load_state(before.state())
    observation = np.ones((2, 4), np.float32)
    for network in (after.online, after.acting):
        assert np.array_equal(network.q_values(observation), before.online.q_values(observation))
    assert any(name.startswith("acting/") for name in after.variables) == now


def test_learning_fits_the_targets():
    learner = make(hidden=(64,), double=False, loss="squared")
    b = batch(1, 32)._replace(discount=np.zeros((1, 32), np.float32))  # a regression on the rewards
    many = Batch(*(np.repeat(x, 300, axis=0) for x in b[:5]))
    first = learner.update(b, 0.01, np.array([False])).loss
    learner.update(many, 0.01, np.zeros(300, bool))
    assert learner.update(b, 0.01, np.array([False])).loss < 0.02 * first


@pytest.mark.parametrize("sync", ["gradients", "parameters"])
def test_an_agent_acts_with_its_newest_weights(sync):
    learner = make(sync=sync)
    observation = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    for change in (
        lambda: learner.update(batch(2, 8), 0.1, np.array([False, True])),
        lambda: learner.load_state({name: 0.5 * array for name, array in learner.state().items()}),
    ):
        before = learner.online.q_values(observation)
        change()
        assert not np.allclose(learner.online.q_values(observation), before)
        np.testing.assert_allclose(
            learner.online.q_values(observation), learner.online(observation), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize(("sync", "steps"), [("gradients", 3), ("parameters", 4)])
def test_ranks_that_skip_alone_still_count_the_same_steps(sync, steps):
    learner, b = make(sync=sync), batch(4, 8)
    b.reward[1, 0] = np.inf
    before = learner.online.variables[0].numpy()
    phase = learner.update(b, 0.01, np.zeros(4, bool))
    assert (phase.updates, phase.skipped, phase.nonfinite) == (3, 1, 1)
    assert int(learner.optimizer.iterations) == steps
    after = learner.online.variables[0].numpy()
    assert np.isfinite(after).all()
    assert not np.array_equal(after, before)


def test_ten_updates_are_ten_steps_of_adam():
    """The gradients follow from other weights in each step, so that a bias correction frozen at t = 1 is seen."""
    learner, b = make(double=False, max_gradient_norm=0.05), batch(10, 32)
    theta = learner.online.variables[0].numpy()
    follower = make(double=False)  # computes gradients at the reference's weights
    gradients = []
    for k in range(10):
        follower.online.variables[0].assign(adam(theta, gradients, 0.01, 0.05, 1e-7) if gradients else theta)
        follower.refresh()
        gradients.append(reference(follower, b, k, double=False, huber=True)[0])
    learner.update(b, 0.01, np.zeros(10, bool))
    expected = adam(theta, gradients, 0.01, 0.05, 1e-7)
    assert np.abs(expected - theta).max() > 0.03
    np.testing.assert_allclose(learner.online.variables[0].numpy(), expected, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("xla", [False, True])
def test_weights_of_one_change_nothing_and_priorities_are_the_errors(passes, xla):
    plain, weighted = make(passes=passes, xla=xla), make(passes=passes, xla=xla)
    b, copies = batch(3, 8), np.array([False, True, False])
    q, target_q = (network.q_values(b.next_observation[0]) for network in (plain.online, plain.target))
    y = b.reward[0] + b.discount[0] * target_q[np.arange(8), q.argmax(axis=1)]
    errors = np.abs(plain.online.q_values(b.observation[0])[np.arange(8), b.action[0]] - y)
    one = plain.update(b, 0.01, copies)
    assert one.priority is None
    other = weighted.update(b._replace(weight=np.ones((3, 8), np.float32)), 0.01, copies)
    assert other.priority.shape == (3, 8)
    np.testing.assert_allclose(other.priority[0], errors, rtol=1e-4, atol=1e-5)
    assert sums(other) == pytest.approx(sums(one), rel=1e-6)
    for a, c in zip(plain.variables.values(), weighted.variables.values(), strict=True):
        np.testing.assert_allclose(a.numpy(), c.numpy(), rtol=1e-6, atol=1e-7)


def test_a_transitions_weight_multiplies_its_loss():
    """Weight 2 for one half of a minibatch and 0 for the other is the first half alone."""
    whole, half = make(), make()
    b = batch(1, 16)
    weight = np.repeat([2.0, 0.0], 8).astype(np.float32)[None]
    one = whole.update(b._replace(weight=weight), 0.01, np.array([False]))
    other = half.update(Batch(*(x[:, :8] for x in b[:5])), 0.01, np.array([False]))
    assert (one.loss, one.gradient_norm) == pytest.approx((other.loss, other.gradient_norm), rel=1e-5)
    np.testing.assert_allclose(
        whole.online.variables[0].numpy(), half.online.variables[0].numpy(), rtol=1e-5, atol=1e-6
    )


class BothStates(Dqn):
    """Bootstraps from the target network's values of s' and of s: what Munchausen's targets need."""

    def target(self, minibatch, online, target):
        here, there = target(minibatch.observation), target(minibatch.next_observation)
        return tf.stop_gradient(tf.reduce_mean(there, axis=-1) - tf.reduce_mean(here, axis=-1))


@pytest.mark.parametrize(("passes", "xla"), [(1, False), (2, False), (1, True)])
def test_an_objective_may_ask_the_target_network_about_either_observation(passes, xla):
    objective = BothStates(double=False, loss="squared")
    learner, b = make(objective=objective, passes=passes, xla=xla), batch(2, 8)
    here, there = (learner.target.q_values(x[0]).mean(axis=1) for x in (b.observation, b.next_observation))
    q = learner.online.q_values(b.observation[0])[np.arange(8), b.action[0]]
    expected = 0.5 * np.mean((q - (there - here)) ** 2)
    first = Batch(*(x[:1] for x in b[:5]))
    assert learner.update(first, 0.01, np.array([False])).loss == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("sizes", [(5,), (2, 3)])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_forbidden_action_of_huge_value_changes_nothing(double, passes, sizes, weighted):
    """The bias of output 1 makes it huge. With it forbidden everywhere, all is as if it were the lowest."""

    def learned(bias: float, mask: np.ndarray | None) -> tuple[float, ...]:
        rng, preprocess, objective = (
            np.random.default_rng(0),
            Preprocess(single((4,))),
            Dqn(double=double, loss="squared", sizes=sizes),
        )
        build = lambda: build_network(  # noqa: E731
            "mlp", preprocess, 5, objective, hidden=(8,), dueling=False, rng=rng, sizes=sizes
        )
        learner = Learner(build, preprocess, objective, Solo(), passes=passes, max_gradient_norm=None)
        for network in (learner.online, learner.target):
            theta = network.variables[0].numpy()
            theta[-4] = bias  # the last five numbers are the outputs' biases
            network.variables[0].assign(theta)
        weight = np.ones((2, 16), np.float32) if weighted else None
        action = np.zeros((2, 16, *((2,) if len(sizes) > 1 else ())), np.int64)
        given = batch(2, 16)._replace(action=action, weight=weight, next_mask=mask)
        return sums(learner.update(given, 1e-4, np.array([False, False])))[1:4]

    mask = np.ones((2, 16, 5), bool)
    mask[..., 1] = False
    expected = learned(-1e6, None)
    assert learned(1e6, mask) == pytest.approx(expected, rel=1e-5)
    assert learned(1e6, None) != pytest.approx(expected, rel=1e-5)


def test_a_factored_loss_is_that_of_the_mean_over_dimensions():
    """Against NumPy, with dimensions of two and of three choices, and a dueling head."""
    sizes, objective = (2, 3), Dqn(double=True, loss="huber", sizes=(2, 3))
    rng, preprocess = np.random.default_rng(0), Preprocess(single((4,)))
    build = lambda: build_network("mlp", preprocess, 5, objective, hidden=(8,), dueling=True, rng=rng, sizes=sizes)  # noqa: E731
    learner = Learner(build, preprocess, objective, Solo())
    b = batch(1, 32)._replace(action=np.random.default_rng(1).integers(sizes, size=(1, 32, 2)))
    split = lambda q: (q[:, :2], q[:, 2:])  # noqa: E731
    online, target = (split(net.q_values(b.next_observation[0])) for net in (learner.online, learner.target))
    rows = np.arange(32)
    ahead = sum(t[rows, o.argmax(axis=1)] for o, t in zip(online, target, strict=True)) / 2
    before = split(learner.online.q_values(b.observation[0]))
    q = sum(part[rows, b.action[0, :, d]] for d, part in enumerate(before)) / 2
    error = np.abs(q - (b.reward[0] + b.discount[0] * ahead))
    phase = learner.update(b, 1e-3, np.array([False]))
    loss = np.where(error <= 1, 0.5 * error**2, error - 0.5).mean()
    assert (phase.loss, phase.mean_q) == pytest.approx((loss, q.mean()), rel=1e-4)
    tensor = learner.online(tf.constant(b.observation[0])).numpy()  # NumPy acts by the same values
    np.testing.assert_allclose(learner.online.q_values(b.observation[0]), tensor, rtol=1e-4, atol=1e-5)
