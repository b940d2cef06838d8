"""A job that would take more memory than there is, is refused before it takes any."""

import numpy as np
import pytest

from hvd_dqn.agent.learner import Learner
from hvd_dqn.agent.replay import Replay
from hvd_dqn.config import Config
from hvd_dqn.errors import InputError
from hvd_dqn.ranks.limits import Limit
from hvd_dqn.ranks.world import Solo
from hvd_dqn.training import memory, worker
from hvd_dqn.training.memory import Memory, bytes_per_update, check_memory, memory_of_rank, updates_per_part
from hvd_dqn.training.plan import Plan
from hvd_dqn.training.worker import Worker

ATARI = 84 * 84 * 4


def test_an_updates_bytes_are_those_of_its_arrays():
    replay = Replay(
        50, 2, (6, 6, 1), np.uint8, np.random.default_rng(0), frame_stack=4, action_shape=(3,), mask_width=5
    )
    draw = replay_filled(replay).draw(3, 8)
    batch = replay.gather(draw)
    arrays = {id(array): array.nbytes for array in (*draw, *batch) if array is not None}
    assert 3 * bytes_per_update(8, 6 * 6 * 4, 3, 5) == sum(arrays.values())


def replay_filled(replay):
    replay._write_positions[:] = 40
    replay._step_types[:, 10:40] = 1
    return replay


@pytest.mark.parametrize(
    ("updates", "each", "together"),
    [
        (4, 1000, 4),
        (1000, 32 * 2 * ATARI, 143),  # 1.8 GB: 7 parts
        (2, memory.PART_BYTES, 1),
        (3, 9 * memory.PART_BYTES, 1),  # no less than one
        (1, 9 * memory.PART_BYTES, 1),
    ],
)
def test_a_phase_is_divided_into_parts_of_about_equal_size(updates, each, together):
    assert updates_per_part(updates, each) == together


def test_refusals_name_what_is_needed_where_it_is_limited_and_the_way_out():
    host = Limit(10e9, "the host")
    for needed, ranks, way_out in [
        (
            Memory(14_100_000_000, 10**6, 10**6),
            1,
            "The job needs 14.1 GB on this machine, but 10.0 GB are available (the host)",
        ),
        (Memory(7_000_000, 10**6, 10**6), 2000, "Lower --replay.capacity, or start fewer"),
        (
            Memory(10**9, 0, 4 * 10**9),
            3,
            "3 ranks x (1.00 GB of replay + 0.00 of minibatches + 4.00 to write a checkpoint)",
        ),
        (Memory(10**9, 12 * 10**9, 0), 1, "Lower --learner.train_period"),
    ]:
        with pytest.raises(InputError) as refused:
            check_memory(needed, ranks, host, "8 environments x 9 observations per rank")
        assert way_out in str(refused.value)
    check_memory(Memory(10**9, 10**9, 10**9), 3, host, "")


def test_writing_a_checkpoint_takes_two_pieces_of_an_array_and_all_weights():
    assert memory_of_rank(10**9, 0, 0, 1000).checkpoint == 2 * (1 << 24) + 4 * 4 * 1000
    assert memory_of_rank(100, 0, 0, 1000).checkpoint == 200 + 16_000
    assert memory_of_rank(0, 10, 32 * 2 * ATARI, 0).minibatches == 2 * 10 * 32 * 2 * ATARI


SETTINGS = {
    "env": {"id": "hvd_dqn.envs.identity:Identity-v0", "envs_per_rank": 2},
    "agent": {"hidden": (8,)},
    "replay": {"capacity": 2000},
    "learner": {"batch_size": 16, "learn_start": 64, "train_period": 64, "samples_per_insert": 4, "target_period": 24},
    "total_steps": 300,
}


def made(**learner):
    return Worker(Config.model_validate(SETTINGS | {"learner": SETTINGS["learner"] | learner}), Solo())


def test_a_worker_refuses_a_replay_that_does_not_fit_beside_its_neighbours(monkeypatch):
    class Pair(Solo):
        local_size = 2

    asked = []

    def available(sharers):
        asked.append(sharers)
        return Limit(60_000, "a small group")

    monkeypatch.setattr(worker, "available_memory", available)
    with pytest.raises(InputError, match=r"2 ranks x .*\(a small group\)|\(a small group\).*2 ranks x"):
        Worker(Config.model_validate(SETTINGS), Pair())
    assert asked == [2]


@pytest.mark.parametrize("sync", ["gradients", "parameters"])
def test_phases_in_parts_learn_the_same(sync, monkeypatch):
    def train(part_bytes):
        monkeypatch.setattr(memory, "PART_BYTES", part_bytes)
        batches = []
        run = Learner._run
        monkeypatch.setattr(
            Learner, "_run", lambda self, batch, *rest: batches.append(len(batch.reward)) or run(self, batch, *rest)
        )
        config = Config.model_validate(SETTINGS | {"ranks": {"sync": sync}})
        agent = Worker(config, Solo())
        agent.begin_episodes()
        phases = []
        for cycle in range(agent.plan.cycles):
            agent.step(cycle)
            if agent.plan.learns_at(cycle):
                agent.begin_phase(cycle)
                phases.append(agent.finish_phase())
        monkeypatch.setattr(Learner, "_run", run)
        agent.close()
        return batches, phases, agent.learner.state()

    whole, phases, weights = train(1 << 28)
    parts, phases_of_parts, weights_of_parts = train(4 * bytes_per_update(16, 8, 1, 0))
    assert whole == [16, 16, 16]
    assert len(parts) > 3 * len(whole)
    assert sum(parts) == sum(whole)
    for one, other in zip(phases, phases_of_parts, strict=True):
        assert (one.updates, one.skipped) == (other.updates, other.skipped) == (16, 0)
        assert other.loss == pytest.approx(one.loss, rel=1e-4)
    for name, array in weights.items():
        np.testing.assert_allclose(weights_of_parts[name], array, rtol=1e-4, atol=1e-5)


def test_no_phase_has_more_updates_than_the_plan_says():
    for envs, period, insert in [(1, 1, 3.7), (3, 64, 4.0), (8, 20, 33.3), (5, 7, 0.3)]:
        learner = SETTINGS["learner"] | {"train_period": period, "samples_per_insert": insert}
        plan = Plan(
            Config.model_validate(SETTINGS | {"learner": learner, "env": SETTINGS["env"] | {"envs_per_rank": envs}}), 1
        )
        most = max(plan.updates_at(cycle) for cycle in range(plan.cycles))
        assert most <= plan.most_updates <= most + 1


def test_large_phases_are_told_with_the_plan(monkeypatch):
    monkeypatch.setattr(memory, "PART_BYTES", 4_000)
    monkeypatch.setattr(worker, "PART_BYTES", 4_000)
    for overlap, told in [(False, "MB are in memory at a time"), (True, "all in memory: --learner.overlap needs them")]:
        agent = made(overlap=overlap)
        assert told in agent.describe()["minibatches"]
        agent.close()
    monkeypatch.undo()
    agent = made()
    assert "minibatches" not in agent.describe()
    agent.close()
