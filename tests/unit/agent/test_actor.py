"""The actor: greedy, random with each environment's own probability, and random for a while."""

import json

import numpy as np
import pytest

from hvd_dqn.agent.actor import Actor
from hvd_dqn.agent.choices import Choices

THREE = Choices((3,))
Q = np.array([[0.0, 2.0, 1.0], [5.0, 2.0, 1.0]])


def rows(observation):
    return Q[observation[:, 0]]


def test_without_exploration_the_largest_value_is_chosen():
    actor = Actor(rows, THREE, np.random.default_rng(0))
    assert actor.act(np.array([[0], [1], [0]]), np.zeros(3)).tolist() == [1, 0, 1]


def test_each_environment_explores_with_its_own_probability():
    actor = Actor(rows, THREE, np.random.default_rng(0))
    observation, epsilons = np.zeros((3, 1), int), np.array([0.0, 0.3, 1.0])
    actions = np.array([actor.act(observation, epsilons) for _ in range(6_000)])
    # A random action is the greedy one in a third of the cases.
    np.testing.assert_allclose((actions != 1).mean(axis=0), epsilons * 2 / 3, atol=0.02)
    np.testing.assert_allclose(np.bincount(actions[:, 2]) / 6_000, 1 / 3, atol=0.03)


def test_the_network_is_not_asked_when_all_explore():
    def never(observation):
        raise AssertionError

    Actor(never, THREE, np.random.default_rng(0)).act(np.zeros((4, 1)), np.ones(4))


def test_a_held_action_lasts_as_often_as_the_zeta_distribution_says():
    actor = Actor(
        rows, Choices((1_000,)), np.random.default_rng(0), zeta=2.0
    )  # so many actions that two neighbours hardly agree
    actions = np.array([actor.act(np.zeros((1, 1), int), np.ones(1))[0] for _ in range(60_000)])
    ends = np.flatnonzero(np.diff(actions) != 0)
    lengths = np.diff(ends)
    for n in (1, 2, 3):  # n**-2 / zeta(2), zeta(2) = pi**2 / 6
        assert (lengths == n).mean() == pytest.approx(n**-2 * 6 / np.pi**2, abs=0.02)


def test_between_held_actions_the_actor_is_greedy():
    actor = Actor(rows, THREE, np.random.default_rng(0), zeta=3.0)
    actions = np.array([actor.act(np.zeros((1, 1), int), np.full(1, 0.05))[0] for _ in range(5_000)])
    assert 0.85 < (actions == 1).mean() < 0.99


@pytest.mark.parametrize("zeta", [None, 2.0])
def test_a_restored_actor_goes_on_alike(zeta):
    first, second = (Actor(rows, THREE, np.random.default_rng(seed), zeta) for seed in (0, 1))
    observation, epsilons = np.zeros((4, 1), int), np.full(4, 0.5)
    for _ in range(10):
        first.act(observation, epsilons)
    state = first.state()
    state["rng"] = json.loads(json.dumps(state["rng"]))
    second.load_state(state)
    for _ in range(20):
        assert np.array_equal(first.act(observation, epsilons), second.act(observation, epsilons))


def test_a_held_action_ends_where_its_episode_does():
    actor = Actor(rows, Choices((1_000,)), np.random.default_rng(0), zeta=1.01)  # hardly ever shorter than LONGEST
    observation, nobody = np.zeros((3, 1), int), np.zeros(3)
    first = actor.act(observation, np.ones(3))
    assert actor.act(observation, nobody).tolist() == first.tolist()
    actor.end_episodes(np.array([False, True, False]))
    assert actor.act(observation, nobody).tolist() == [first[0], 1, first[2]]  # 1 is the greedy one
    Actor(rows, THREE, np.random.default_rng(0)).end_episodes(np.ones(3, bool))  # which holds nothing


def test_a_mask_restricts_random_and_greedy_actions():
    mask = np.array([[True, False, True], [False, True, True]])
    for zeta in (None, 2.0):
        actor = Actor(rows, THREE, np.random.default_rng(0), zeta)
        actions = np.array([actor.act(np.array([[0], [1]]), np.array([0.5, 0.5]), mask) for _ in range(500)])
        assert set(actions[:, 0]) == {0, 2}
        assert set(actions[:, 1]) == {1, 2}
        assert actor.act(np.array([[0], [1]]), np.zeros(2), mask)[0] in (0, 2)


def test_a_held_action_that_becomes_invalid_is_drawn_again_and_the_new_one_is_held():
    actor = Actor(rows, Choices((1_000,)), np.random.default_rng(0), zeta=1.01)
    free, before, held = np.ones((1, 1_000), bool), None, 0
    for step in range(300):
        mask = free.copy()
        if step % 10 == 9:
            mask[0, before] = False
        (action,) = actor.act(np.zeros((1, 1), int), np.ones(1), mask)
        assert mask[0, action]
        held += action == before
        before = action
    assert held > 200  # of 270


def test_all_dimensions_of_an_environment_explore_together():
    actor = Actor(
        lambda o: np.tile([1.0, 0, 0, 1, 0, 0, 1, 0, 0], (len(o), 1)), Choices((3, 3, 3)), np.random.default_rng(0)
    )
    actions = np.array([actor.act(np.zeros((2, 1)), np.array([0.5, 0.0])) for _ in range(4_000)])
    assert (actions[:, 1] == 0).all()
    greedy = (actions[:, 0] == 0).all(axis=1).mean()
    assert greedy == pytest.approx(0.5 + 0.5 / 27, abs=0.03)  # 1 / 8 if each dimension explored by itself
    assert set(map(tuple, actions[:, 0])) == set(np.ndindex(3, 3, 3))
