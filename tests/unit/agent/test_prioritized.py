"""Prioritized replay: drawn in proportion to priorities, weighted so that nothing is biased, on any number of ranks."""

import numpy as np
import pytest

from hvd_dqn.agent.prioritized import LEAST, PrioritizedReplay, SumTree
from hvd_dqn.agent.transition import Transition

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("leaves", [1, 31, 32, 17, 1_025, 40_000, 2_000_000])
def test_a_tree_finds_the_leaf_in_whose_part_of_the_line_a_place_lies(leaves):
    tree, values = SumTree(leaves), np.zeros(leaves)
    for size in (leaves, 7, 300):
        at = RNG.integers(leaves, size=size)
        new = RNG.random(size) * (RNG.random(size) < 0.7)  # some are 0
        tree.set(at, new)
        values[at] = new
        assert tree.total == pytest.approx(values.sum(), rel=1e-12)
    np.testing.assert_array_equal(tree.leaves, values)
    if values.sum() == 0:
        values[0] = 1.0
        tree.set_all(values)
    places = RNG.random(2_000) * values.sum()
    expected = np.searchsorted(np.cumsum(values), places, side="right")
    found = tree.find(places)
    assert (found != expected).mean() < 0.002  # places at a border, by rounding
    assert (values[found] > 0).all()
    other = SumTree(leaves)
    other.set_all(values)
    np.testing.assert_array_equal(other.find(places), tree.find(places))


def test_a_leaf_that_is_empty_is_never_found_also_at_the_ends_of_the_line():
    tree = SumTree(100)
    tree.set(np.array([40, 41, 70]), np.array([0.1, 0.2, 0.3]))
    total = tree.total
    assert tree.find(np.array([0.0, 0.1 - 1e-12, 0.1 + 1e-12, np.nextafter(total, 0), total])).tolist() == [
        40,
        40,
        41,
        70,
        70,
    ]


def replay(slots=8, envs=2, seed=0, exponent=1.0, **named):
    return PrioritizedReplay(slots, envs, (1,), np.float32, np.random.default_rng(seed), exponent=exponent, **named)


def fill(memory, steps, ends=()):
    """Steps 0, 1, ... in every environment; the reward is the step's number. Episodes end after the steps in `ends`."""
    envs = memory._envs
    for step in range(steps):
        before, after = (np.full((envs, 1), t, np.float32) for t in (step, step + 1))
        none, all_ = np.zeros(envs, np.bool_), np.ones(envs, np.bool_)
        over = all_ if step in ends else none
        memory.add(
            Transition(
                before,
                np.zeros(envs, np.int64),
                np.full(envs, step, np.float32),
                over,
                none,
                after,
                all_,
            )
        )


def alone(own):
    """The largest over one rank."""
    return own


def drawn_share(memory, count=40_000, importance=0.0):
    draw = memory.weighted(memory.draw(1, count), importance, alone)
    slots = np.bincount(draw.start[0], minlength=memory._envs * memory._slots)
    return slots / count, draw


def test_transitions_are_drawn_in_proportion_to_their_priority_and_weighted_against_it():
    for exponent in (0.0, 0.5, 1.0):
        memory = replay(slots=8, envs=1, exponent=exponent)
        fill(memory, 5)
        draw = memory.draw(1, 200)
        memory.update_priorities(draw, draw.start.astype(np.float32))  # transition i has priority i
        p = (np.arange(5) + LEAST) ** exponent
        p = p / p.sum()
        share, draw = drawn_share(memory, importance=0.5)
        np.testing.assert_allclose(share[:5], p, atol=0.01)
        assert share[5:].sum() == 0
        weight = (p[draw.start[0]]) ** -0.5
        np.testing.assert_allclose(draw.weight[0], weight / weight.max(), rtol=1e-5)
        assert draw.weight.dtype == np.float32
        assert draw.weight.max() == 1


def test_new_transitions_get_the_largest_priority_seen_on_any_rank():
    memory = replay(slots=16, envs=1)
    fill(memory, 3)
    draw = memory.draw(1, 100)
    memory.update_priorities(draw, np.full((1, 100), 7.0, np.float32))
    memory.update_priorities(draw, np.full((1, 100), 2.0, np.float32))
    fill(memory, 1)
    memory.draw(1, 1)
    assert memory._tree.leaves[:5] == pytest.approx([2 + LEAST] * 3 + [7 + LEAST] + [0])
    memory.weighted(memory.draw(1, 1), 0.0, lambda own: np.maximum(own, [0.0, 50.0]))  # another rank has seen 50
    fill(memory, 1)
    memory.draw(1, 1)
    assert memory._tree.leaves[4] == pytest.approx(50 + LEAST)


def test_a_priority_that_comes_late_does_not_reach_a_younger_transition():
    memory = replay(slots=4, envs=1)
    fill(memory, 3)
    draw = memory.draw(1, 50)
    fill(memory, 2)  # overwrites the two oldest
    memory.draw(1, 1)
    memory.update_priorities(draw, np.full((1, 50), 9.0, np.float32))
    held = memory.is_held(draw)
    assert 0 < held.sum() < 50
    nine = np.flatnonzero(memory._tree.leaves > 8)
    assert set(nine) == set(draw.start[held])
    assert len(nine) == 1


@pytest.mark.parametrize("n_step", [1, 3])
@pytest.mark.parametrize("frame_stack", [1, 3])
@pytest.mark.parametrize("ends", [(), (2, 3, 9), range(99)])
def test_only_starts_are_drawn_and_their_sum_is_known(n_step, frame_stack, ends):
    for steps in (1, 2, 4, 9, 23):
        memory = replay(slots=8, envs=3, n_step=n_step, frame_stack=frame_stack)
        fill(memory, steps, ends)
        starts = memory._starts()
        if len(starts) == 0:
            with pytest.raises(ValueError, match="no transition that can be sampled"):
                memory.draw(1, 1)
            continue
        memory._sync()
        leaves = np.where(memory._tree.leaves > 0, RNG.random(24) + 0.1, 0)
        memory._tree.set_all(leaves)
        assert memory._sum_of_starts() == pytest.approx(leaves[starts].sum())
        share, draw = drawn_share(memory, 20_000)
        np.testing.assert_allclose(share[starts], leaves[starts] / leaves[starts].sum(), atol=0.02)
        assert share[starts].sum() == pytest.approx(1)
        assert memory.is_held(draw).all()


@pytest.mark.parametrize("importance", [0.4, 1.0])
def test_the_weighted_sum_over_ranks_is_that_of_one_rank_over_the_union(importance):
    """Exactly, in expectation: sum over i of P(i) * weight(i) * g(i), with the gradient g of each transition."""
    ranks = []
    for rank, steps in enumerate((5, 3, 6)):
        memory = replay(slots=8, envs=1, seed=rank)
        fill(memory, steps)
        memory._sync()
        memory._tree.set_all(np.where(memory._tree.leaves > 0, RNG.random(8) + 0.1, 0))
        ranks.append(memory)
    gradient = [RNG.normal(size=8) for _ in ranks]
    size, count = len(ranks), sum(len(memory._starts()) for memory in ranks)
    # Ours: each rank draws by its own sum; its weights, before they are divided by the largest, are share**-importance.
    ours = 0.0
    for memory, g in zip(ranks, gradient, strict=True):
        for i in memory._starts():
            share = memory._tree.leaves[i] / memory._sum_of_starts()
            ours += share * share**-importance * g[i] / size
    # The whole memory drawn with P(i) = p_i / (size * its rank's sum), weighted by (N P(i))**-importance.
    union = 0.0
    for memory, g in zip(ranks, gradient, strict=True):
        for i in memory._starts():
            probability = memory._tree.leaves[i] / (size * memory._sum_of_starts())
            union += probability * (count * probability) ** -importance * g[i]
    assert ours * (count / size) ** -importance == pytest.approx(union)
    if importance == 1.0:  # nothing is biased: it is the plain mean over the memory
        plain = np.mean(np.concatenate([g[memory._starts()] for memory, g in zip(ranks, gradient, strict=True)]))
        assert union == pytest.approx(plain)


def test_weights_are_divided_by_the_largest_of_their_minibatch_on_any_rank():
    memory = replay(slots=8, envs=1)
    fill(memory, 5)
    draw = memory.draw(1, 99)
    memory.update_priorities(draw, 1.0 + draw.start.astype(np.float32))
    sent = []

    def largest(own):
        sent.append(own.copy())
        return np.append(own[:-1] * [2.0, 1.0, 5.0], own[-1])

    draw = memory.weighted(memory.draw(3, 20), 1.0, largest)
    assert sent[0].shape == (4,)
    np.testing.assert_allclose(draw.weight.max(axis=1), [0.5, 1.0, 0.2], rtol=1e-6)


def test_a_restored_memory_goes_on_as_the_saved_one_would_have():
    one, other = replay(seed=1), replay(seed=2)
    fill(one, 11, (4, 7))
    draw = one.draw(2, 30)
    one.update_priorities(draw, RNG.random((2, 30)).astype(np.float32) * 5)
    fill(one, 2)
    state = {name: np.copy(value) if isinstance(value, np.ndarray) else value for name, value in one.state().items()}
    other.load_state(state)
    for memory in (one, other):
        fill(memory, 3)
    mine, theirs = (memory.weighted(memory.draw(2, 30), 0.7, alone) for memory in (one, other))
    for a, b in zip(mine, theirs, strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(one._tree.leaves, other._tree.leaves)
    assert one.largest == other.largest


def test_without_priorities_all_transitions_are_like_new_ones_and_without_the_largest_it_is_theirs():
    one, other = replay(seed=1, exponent=0.5), replay(seed=2, exponent=0.5)
    fill(one, 6)
    draw = one.draw(1, 200)
    one.update_priorities(draw, 4.0 + np.arange(200, dtype=np.float32)[None] % 3)
    state = one.state()
    uniform = {name: value for name, value in state.items() if name not in ("priorities", "largest_priority")}
    other.load_state(uniform)
    assert set(other._tree.leaves) == {0.0, (1 + LEAST) ** 0.5}
    np.testing.assert_array_equal(other._tree.leaves > 0, one._tree.leaves > 0)
    other.load_state({name: value for name, value in state.items() if name != "largest_priority"})
    np.testing.assert_array_equal(other._tree.leaves, one._tree.leaves)
    assert other.largest == pytest.approx(6)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_priority_that_is_not_finite_is_left_out(value):
    memory = replay(envs=1)
    fill(memory, 5)
    draw = memory.draw(1, 60)
    before = memory._tree.leaves.copy()
    priority = np.full((1, 60), 3.0, np.float32)
    odd = draw.start[0] == draw.start[0, 0]
    priority[0, odd] = value
    memory.update_priorities(draw, priority)
    assert memory.largest == 3
    assert memory._tree.leaves[draw.start[0, 0]] == before[draw.start[0, 0]]
    assert np.isfinite(memory._tree.total)
    assert np.isfinite(memory.weighted(memory.draw(1, 60), 0.5, alone).weight).all()
