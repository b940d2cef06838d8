"""Environments of the application areas, each with what it needs: trained a little, evaluated, stopped and resumed.

Their packages are the extra `envs`; a row whose package is missing is skipped. What is learned is not tested here.
"""

import itertools
import math
from typing import Any, NamedTuple

import pytest

import hvd_dqn

# Few steps in few copies, a small network and short evaluations: a row shall take some seconds.
COMMON = {
    "total_steps": 160,
    "env.envs_per_rank": 2,
    "agent.hidden": [16],
    "learner.learn_start": 40,
    "learner.batch_size": 8,
    "learner.samples_per_insert": 1,
    "learner.train_period": 20,
    "replay.capacity": 200,
    "ranks.vote_period": 80,
    "report.period": 80,
    "evaluation.period": 100,
    "evaluation.episodes": 2,
    "evaluation.final_episodes": 2,
    "evaluation.max_episode_steps": 15,
    "checkpoint.period": 1_000,
}


class Row(NamedTuple):
    id: str
    package: str  # that registers it
    settings: dict[str, Any]  # what it needs
    shape: tuple[int, ...] | None  # of what the policy takes; None for a dictionary or a tuple
    choices: tuple[int, ...]  # the actions or, if they are factored, the choices in each dimension
    is_exact: bool | None  # whether a resumed run continues exactly; None if the probe's time limit may decide


MINATAR = {  # planes of 10 x 10, and actions that do something
    "Asterix": (4, 5),
    "Breakout": (4, 3),
    "Freeway": (7, 3),
    "Seaquest": (10, 6),
    "SpaceInvaders": (6, 4),
}
HIGHWAY = {"config": {"lanes_count": 4, "vehicles_count": 10, "duration": 8}}
# fmt: off
ROWS = [
    # Its observation is a dictionary with a text. A wrapper of minigrid takes the image alone: three numbers a cell.
    Row("MiniGrid-Empty-5x5-v0", "minigrid", {"env.wrappers": "minigrid.wrappers:ImgObsWrapper"}, (7, 7, 3), (7,), True),
    # The image for a small CNN, and beside it the direction: the text alone is left out.
    Row("minigrid:MiniGrid-DoorKey-5x5-v0", "minigrid",
        {"env.wrappers": [{"FilterObservation": {"filter_keys": ["direction", "image"]}}], "env.observation_scale": 10,
         "agent.network": "minatar"},
        None, (7,), True),
    # The image, the direction and the text as one vector, by minigrid's own wrapper.
    Row("MiniGrid-Empty-5x5-v0", "minigrid", {"env.wrappers": "minigrid.wrappers:FlatObsWrapper"}, (2835,), (7,), True),
    # MinAtar registers by a function that an entry point names. It draws from a generator of its own: not exact.
    *(Row(f"MinAtar/{game}-v1", "minatar", {}, (10, 10, planes), (actions,), False)
      for game, (planes, actions) in MINATAR.items()),
    # Grey frames, four of them stacked. Its own vector class, which shows others, is not used.
    Row("ale_py:ALE/Pong-v5", "ale_py", {"env.kwargs": {"obs_type": "grayscale"}, "env.frame_stack": 4, "agent.network": "cnn"},
        (210, 160, 4), (6,), None),
    # The 128 bytes of the console's memory.
    Row("ALE/Pong-v5", "ale_py", {"env.kwargs": {"obs_type": "ram"}}, (128,), (6,), None),
    # Nested arguments; five vehicles of five numbers each. About 60 steps/s: episodes of eight steps.
    Row("highway-fast-v0", "highway_env", {"env.kwargs": HIGHWAY}, (5, 5), (5,), None),
    # Three values a joint, all combinations in one head; and bang-bang control, a head for each joint.
    Row("Hopper-v5", "mujoco", {"env.action_bins": 3}, (11,), (27,), None),
    Row("HalfCheetah-v5", "mujoco", {"env.action_bins": 2, "agent.factored": True}, (17,), (2, 2, 2, 2, 2, 2), None),
    # The state's number becomes a one-hot vector. Taxi tells the valid actions as info["action_mask"].
    Row("Taxi-v4", "gymnasium", {}, (), (6,), True),
    Row("FrozenLake8x8-v1", "gymnasium", {}, (), (4,), True),
    # Without a time limit of its own: random walks fall for thousands of steps.
    Row("CliffWalking-v1", "gymnasium", {"env.max_episode_steps": 50}, (), (4,), True),
    # A tuple of three numbers: three one-hot vectors.
    Row("Blackjack-v1", "gymnasium", {}, None, (2,), True),
    # Five actions instead of steering, gas and brake. Each reset builds a new track, which takes a while.
    Row("CarRacing-v3", "Box2D", {"env.kwargs": {"continuous": False}, "agent.network": "cnn", "env.envs_per_rank": 1},
        (96, 96, 3), (5,), None),
    # A state's number. It imports old gym, which prints a notice.
    Row("Sepsis/ICU-Sepsis-v2", "icu_sepsis", {}, (), (25,), None),
]
# fmt: on


@pytest.mark.filterwarnings("ignore")  # the environments' own
@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.id} {row.shape}".replace("/", "-"))
def test_it_is_trained_evaluated_stopped_and_resumed(row, tmp_path, capfd, monkeypatch):
    pytest.importorskip(row.package)
    monkeypatch.chdir(tmp_path)  # MuJoCo writes its log into the current folder
    votes = itertools.count()
    settings = {**COMMON, "env.id": row.id, **row.settings}
    stopped = hvd_dqn.train(run_dir=tmp_path / "run", stop=lambda: next(votes) == 0, **settings)
    assert (stopped.outcome, stopped.total_steps) == ("stopped", 80)

    result = hvd_dqn.train(run_dir=tmp_path / "run", resume=True)
    assert (result.outcome, result.total_steps) == ("finished", 160)
    assert math.isfinite(result.return_mean)
    assert result.episodes == 2
    plan = (tmp_path / "run/run.json").read_text()
    assert row.is_exact in (None, "the run continues exactly" in plan)

    assert 1 <= hvd_dqn.evaluate(tmp_path / "run", episodes=2).length_mean <= 15
    policy = result.policy
    assert policy.observation_shape == row.shape
    assert policy.choices.sizes == row.choices
    seen = policy.begin(policy.observation_space.sample())
    assert policy.action_space.contains(policy.act(seen))
    assert ("masks are used" in plan) == (row.id == "Taxi-v4")
    assert "unmaintained" not in capfd.readouterr().err  # old gym's notice
