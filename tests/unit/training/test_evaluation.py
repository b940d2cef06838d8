"""Evaluation: each episode counts once, with a seed of its own, however many ranks and copies share them."""

import json

import gymnasium
import numpy as np
import pytest

import hvd_dqn
from hvd_dqn import job
from hvd_dqn.config import Config
from hvd_dqn.envs.environments import Environments
from hvd_dqn.errors import RunError
from hvd_dqn.ranks.world import Solo
from hvd_dqn.training.build import make_evaluator, make_policy
from hvd_dqn.training.evaluation import Evaluator


class OneOf(Solo):
    """A rank of several whose sums are collected and added up by hand."""

    def __init__(self, rank, size):
        super().__init__()
        self.rank, self.size = rank, size


def lean(observation):
    """A policy whose episodes have very different lengths: pushes the cart towards the side the pole leans to."""
    return (observation[:, 2] > 0).astype(np.int64)


def evaluator(copies, world=None, max_length=1_000, id="CartPole-v1", act=lean, stop=lambda: False, epsilon=0.0):
    envs = Environments(id, copies, vectorization="sync", evaluates=True)
    return Evaluator(
        envs, make_policy(envs, lambda o: np.eye(envs.actions)[act(o)]), world or Solo(),
        epsilon=epsilon, seed=7, max_length=max_length, stop=stop,
    )  # fmt: skip


@pytest.mark.parametrize("epsilon", [0.0, 0.1])
def test_the_result_does_not_depend_on_the_number_of_copies(epsilon):
    results = []
    for copies in (1, 3, 10):
        one, played = evaluator(copies, epsilon=epsilon), []
        play = one._play
        one._play = lambda *episodes, play=play, played=played: played.append(play(*episodes)) or played[-1]
        results.append(one.evaluate(10, round=4))
        one.close()
    returns = np.concatenate([returns for returns, *_ in played])
    assert results[0]["return_std"] == pytest.approx(np.std(returns)) != 0
    assert (results[0]["return_min"], results[0]["return_max"]) == (returns.min(), returns.max())
    for result in results[1:]:
        assert result == pytest.approx(results[0])
    assert results[0]["episodes"] == 10
    assert results[0]["return_min"] < results[0]["return_mean"] < results[0]["return_max"]
    assert results[0]["length_mean"] == pytest.approx(results[0]["return_mean"])  # a reward of 1 per step


@pytest.mark.parametrize("epsilon", [0.0, 0.1])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_episodes_are_shared_out_without_loss_even_to_a_rank_that_gets_none(size, epsilon):
    alone = evaluator(3, epsilon=epsilon).evaluate(3, round=0)
    played = []
    for rank in range(size):
        one = evaluator(2, OneOf(rank, size), epsilon=epsilon)
        world, vectors = one._world, []
        world.sum = lambda values, kept=vectors: (kept.append(values), np.array([1.0, 0, 0][: len(values)]))[1]
        one.evaluate(3, round=0)
        played.append(vectors[0])  # count, sum of returns, sum of lengths
    count, total, length = np.sum(played, axis=0)
    assert count == 3
    assert total / count == pytest.approx(alone["return_mean"])
    assert length / count == pytest.approx(alone["length_mean"])


def test_seeds_fit_the_signed_integers_of_simulators_and_differ():
    one, seeds = evaluator(10), []
    begin = one.envs.begin
    one.envs.begin = lambda given: seeds.extend(seed for seed in given if seed is not None) or begin(given)
    one.evaluate(60, round=1)  # half of 60 numbers of 32 bits would be too large
    one.close()
    assert len(set(seeds)) == 60
    assert 0 <= min(seeds) < max(seeds) < 2**31


@pytest.mark.parametrize(("episodes", "size", "copies"), [(20, 1, 20), (20, 3, 7), (2, 3, 1), (1_000, 2, 32)])
def test_a_rank_has_a_copy_per_episode_but_never_more_than_it_can_hold(episodes, size, copies):
    config = Config.model_validate({"env": {"id": "CartPole-v1"}, "evaluation": {"episodes": episodes}})
    one = make_evaluator(config, OneOf(0, size), lambda o: np.zeros((len(o), 2)))
    assert one.envs.copies == copies
    one.close()


class Fails(gymnasium.Wrapper):
    """CartPole that fails in each `period`-th step of all copies together, for the first `times`."""

    steps = failures = 0
    period, times = 10**9, 0

    def step(self, action):
        Fails.steps += 1
        if Fails.steps % Fails.period == 0 and Fails.failures < Fails.times:
            Fails.failures += 1
            raise RuntimeError("the simulator lost its connection")
        return self.env.step(action)


gymnasium.register("Fails-v0", lambda: Fails(gymnasium.make("CartPole-v1")))


@pytest.fixture
def failing():
    """Makes the environment fail: (period, times)."""

    def begin(period, times):
        Fails.steps = Fails.failures = 0
        Fails.period, Fails.times = period, times

    yield begin
    begin(10**9, 0)


def failing_evaluator(restarts, episodes=20, size=1):
    settings = {"env": {"id": "Fails-v0", "restart_failed_envs": restarts}, "evaluation": {"episodes": episodes}}
    one = make_evaluator(Config.model_validate(settings), OneOf(0, size), lambda o: np.eye(2)[lean(o)])
    return one


def test_what_a_failure_interrupts_in_an_evaluation_is_played_again_exactly(failing, capfd):
    expected = failing_evaluator(0).evaluate(20, round=3)
    failing(131, 4)
    one = failing_evaluator(4)
    assert one.evaluate(20, round=3) == expected
    assert one.envs.restarted == one.envs.take_unreported()[1] == Fails.failures == 4
    told = capfd.readouterr().err
    assert told.count("hvd-dqn: Environment ") == 4
    assert "on rank 0, in an evaluation, failed in step" in told


def test_an_environment_that_fails_in_an_evaluation_once_too_often_is_to_be_mended(failing):
    failing(131, 3)
    with pytest.raises(
        RunError, match=r"connection. Fix it, or let ranks make their environments again.*restart_failed"
    ):
        failing_evaluator(2).evaluate(20, round=3)


def test_an_evaluation_whose_episodes_never_get_to_their_end_stops_the_job_however_many_restarts_are_left(failing):
    failing(20 * 12, 10**9)  # each of 20 copies takes 12 steps, and no episode of this policy is as short
    with pytest.raises(RunError, match=r"10 evaluation episodes of Fails-v0 in a row.*none was finished"):
        failing_evaluator(10**6).evaluate(20, round=3)


def test_an_evaluation_may_begin_after_the_episodes_of_another():
    for size in (1, 2):
        one, played = evaluator(2, OneOf(size - 1, size)), []
        one._play = lambda mine, *_, played=played: played.extend(mine) or (np.ones(1), np.ones(1), False)
        one.evaluate(5, round=0, first=3)
        one.close()
        assert played == [[3, 4, 5, 6, 7], [4, 6]][size - 1]


def test_another_round_has_other_episodes_and_the_same_round_the_same():
    one = evaluator(5)
    first, again, other = (one.evaluate(5, round=round) for round in (1, 1, 2))
    assert first == again
    assert first != other


def test_as_many_actions_are_random_as_it_is_told():
    chosen, one = [], evaluator(1, epsilon=0.25)  # a copy that rests has no action
    step = one.envs.step
    one._policy = make_policy(one.envs, lambda o: np.tile([0.0, 1.0], (len(o), 1)))
    one.envs.step = lambda action: (chosen.append(action.copy()), step(action))[1]
    for round in range(20):
        one.evaluate(10, round)
    actions = np.concatenate(chosen)
    assert len(actions) > 1_000
    # Half of the random ones are the greedy one too; four standard deviations.
    assert abs(np.mean(actions == 0) - 0.125) < 4 * np.sqrt(0.125 * 0.875 / len(actions))


def test_an_episode_without_end_counts_as_it_is_at_the_longest_length():
    result = evaluator(2, max_length=30, id="MountainCar-v0", act=lambda o: np.ones(len(o), np.int64)).evaluate(
        4, round=0
    )
    assert result["length_mean"] == 30
    assert result["return_mean"] == -30


def test_all_ranks_break_off_when_one_of_them_is_to_stop():
    steps = []
    asked = evaluator(2, act=lambda o: (steps.append(1), lean(o))[1], stop=lambda: len(steps) >= 5)
    assert asked.evaluate(4, round=0) is None
    assert len(steps) == 5
    other = evaluator(2)
    other._world.max = lambda values: np.maximum(values, [0, 0, 1, 0])  # another rank's wish
    assert other.evaluate(4, round=0) is None


def test_an_evaluation_of_a_run_fills_gaps_with_that_runs_mean(tmp_path, monkeypatch):
    settings = {
        "env.normalize_observation": True,
        "env.on_nonfinite": "hold",
        "env.id": "CartPole-v1",
        "total_steps": 400,
    }
    hvd_dqn.train("identity", run_dir=tmp_path, progress=False, **settings)
    made = []
    monkeypatch.setattr(job, "make_evaluator", lambda *values: made.append(make_evaluator(*values)) or made[0])
    hvd_dqn.evaluate(tmp_path, episodes=2)
    mean = json.loads(max(tmp_path.glob("checkpoints/*/state*.json")).read_text())["normalizer"]["mean"]
    np.testing.assert_allclose(made[0].envs.readings.neutral, mean, rtol=1e-6)
    assert np.abs(mean).min() > 0
