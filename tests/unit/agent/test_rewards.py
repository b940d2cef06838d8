"""Rewards are divided by the deviation of the discounted return of all ranks, as VecNormalize does it."""

import json

import numpy as np
import pytest

from hvd_dqn.agent.layout import single
from hvd_dqn.agent.preprocess import RunningStatistics, merge
from hvd_dqn.agent.rewards import Rewards, StoredRewards

RNG = np.random.default_rng(3)
GAMMA = 0.9


def alone(values):
    return values


def play(rewards: Rewards, steps: int, rng) -> list[float]:
    """Random rewards and ends of episodes. Returns all discounted returns, computed one by one."""
    envs, found = len(rewards._returns), []
    running = [0.0] * envs
    for _ in range(steps):
        reward, ended, valid = rng.normal(3, 5, envs).astype(np.float32), rng.random(envs) < 0.2, rng.random(envs) < 0.8
        rewards.observe(reward, ended & valid, valid)
        for i in np.flatnonzero(valid):
            running[i] = GAMMA * running[i] + float(reward[i])
            found.append(running[i])
            running[i] = 0.0 if ended[i] else running[i]
    return found


def test_rewards_are_divided_by_the_deviation_then_scaled_then_clipped():
    rewards = Rewards(4, GAMMA, scale=2.0, clip=1.5)
    assert rewards.learned(np.float32([0.5, -9])).tolist() == pytest.approx([1.0, -1.5])  # before any merge
    returns = play(rewards, 300, RNG)
    merge([rewards], alone)
    deviation = np.std(returns)
    np.testing.assert_allclose(
        rewards.learned(np.float32([[1.0], [-2.0]])), [[2 / deviation], [-4 / deviation]], rtol=1e-5
    )
    assert np.abs(rewards.learned(np.float32([1e3, -1e3]))).tolist() == [1.5, 1.5]


def test_the_deviation_is_that_of_all_ranks_and_comes_in_the_same_collective_as_other_statistics():
    ranks = [(RunningStatistics(single((3,))), Rewards(2, GAMMA)) for _ in range(3)]
    returns, sent = [], []
    for index, (statistics, rewards) in enumerate(ranks):
        statistics.observe(RNG.normal(size=(5, 3)))
        returns += play(rewards, 10 * (index + 1), RNG)
        sent.append(np.concatenate([statistics.pending(), rewards.pending()]))
    calls = []
    for statistics, rewards in ranks:
        merge([statistics, rewards], lambda values: calls.append(len(values)) or np.sum(sent, axis=0))
    assert calls == [1 + 2 * 3 + 1 + 2 * 1] * 3
    for statistics, rewards in ranks:
        assert 1 / rewards.shared()["scale"][0] == pytest.approx(np.std(returns), rel=1e-5)
        assert statistics.shared()["count"] == 15
    merge([StoredRewards(), StoredRewards()], lambda values: 1 / 0)  # nothing to send: no collective


def test_a_restored_one_goes_on_alike():
    one, other = Rewards(3, GAMMA), Rewards(3, GAMMA)
    play(one, 20, RNG)
    merge([one], alone)
    play(one, 5, RNG)
    other.load_state(json.loads(json.dumps(one.state())))
    other.load_pending_state(one.pending_state())
    for each in (one, other):
        play(each, 20, np.random.default_rng(1))
        merge([each], alone)
    assert one.shared()["scale"] == other.shared()["scale"] != 1
    other.load_state({})  # a run without them gave its weights
    assert one.shared()["scale"] == other.shared()["scale"]


def test_what_is_stored_as_it_is_learned_stays_as_it_is():
    reward = RNG.normal(size=5).astype(np.float32)
    learned = StoredRewards().learned(reward)
    assert learned.dtype == np.float64
    np.testing.assert_array_equal(learned, reward)
