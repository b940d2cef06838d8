"""The lockstep arithmetic, by tables for 1, 2, 3 and 8 ranks."""

import numpy as np
import pytest

from hvd_dqn.config import Config
from hvd_dqn.config_files import load_preset, presets
from hvd_dqn.errors import InputError
from hvd_dqn.training.plan import Plan


def config(**sections) -> Config:
    """8 environments, batch 64, 32 samples per insert: the numbers that the tables below are worked out for."""
    base = {
        "total_steps": 50_000,
        "env": {"envs_per_rank": 8},
        "learner": {
            "batch_size": 64,
            "samples_per_insert": 32,
            "learn_start": 1_000,
            "train_period": 256,
            "target_period": 512,
        },
    }
    for name, values in sections.items():
        base[name] = {**base.get(name, {}), **values} if isinstance(values, dict) else values
    return Config.model_validate(base)


def test_weak_scaling_keeps_the_share_of_a_rank_and_the_samples_per_insert():
    #     size  envs  batch  cycles  updates: 49,152 steps after warm-up x 32 / batch, to the last multiple of 256
    for size, envs, batch, cycles in [(1, 8, 64, 6250), (2, 16, 128, 3125), (3, 24, 192, 2084), (8, 64, 512, 782)]:
        plan = Plan(config(), size)
        assert (plan.envs, plan.global_batch, plan.cycles) == (envs, batch, cycles)
        updates = sum(plan.updates_at(cycle) for cycle in range(plan.cycles))
        trained_on = updates * plan.global_batch
        assert trained_on == pytest.approx(32 * (50_000 - 1_000), rel=0.02)
        assert updates == plan.updates_after(plan.cycles - 1)


def test_strong_scaling_takes_the_same_updates_in_the_same_cycles_at_any_size():
    one = Plan(config(ranks={"scaling": "strong"}), 1)
    for size in (2, 4, 8):
        plan = Plan(config(ranks={"scaling": "strong"}), size)
        assert (plan.envs_per_rank, plan.batch_per_rank) == (8 // size, 64 // size)
        assert (plan.envs, plan.global_batch, plan.cycles) == (8, 64, 6250)
        for cycle in range(one.cycles):
            assert plan.updates_at(cycle) == one.updates_at(cycle)


def test_strong_scaling_that_does_not_divide_is_refused_with_a_number_that_does():
    with pytest.raises(InputError, match=r"`env.envs_per_rank`.*8 on 3 ranks.*--env.envs_per_rank 9"):
        Plan(config(ranks={"scaling": "strong"}), 3)


def test_phases_come_every_train_period_after_the_warm_up():
    plan = Plan(config(), 2)
    phases = [(plan.total_steps_after(c), plan.updates_at(c)) for c in range(plan.cycles) if plan.learns_at(c)]
    # 1,024 - 1,000 = 24 steps are owed 24 * 32 / 128 = 6 updates, then 256 * 32 / 128 = 64.
    assert phases[:3] == [(1_024, 6), (1_280, 64), (1_536, 64)]


def test_a_cycle_longer_than_the_train_period_still_keeps_the_samples_per_insert():
    plan = Plan(config(learner={"train_period": 4}), 8)
    learning = [plan.updates_at(cycle) for cycle in range(100, 200)]
    assert sum(learning) * 512 == 100 * 64 * 32


def test_the_target_is_copied_by_update_count_so_that_copies_are_target_period_steps_apart():
    for size in (1, 2, 3, 8):
        plan = Plan(config(), size)
        copies = sum(int(plan.target_copies_at(cycle).sum()) for cycle in range(plan.cycles))
        assert copies == pytest.approx((50_000 - 1_000) / 512, abs=1.5)
        for cycle in range(0, plan.cycles, 7):
            assert len(plan.target_copies_at(cycle)) == plan.updates_at(cycle)


def test_a_target_period_shorter_than_an_update_copies_after_each():
    plan = Plan(config(learner={"target_period": 1}), 1)
    cycle = next(c for c in range(plan.cycles) if plan.learns_at(c))
    assert plan.target_copies_at(cycle).all()


def test_every_multiple_of_a_period_has_exactly_one_cycle():
    for size in (1, 2, 3, 8):
        plan = Plan(config(evaluation={"period": 5_000}, report={"period": 1_000}), size)
        evaluated = [plan.total_steps_after(c) for c in range(plan.cycles) if plan.evaluates_at(c)]
        assert [steps // 5_000 for steps in evaluated] == list(range(1, 11))
        assert all(steps % 5_000 < plan.steps_per_cycle for steps in evaluated)


def test_an_overlapping_phase_ends_wherever_something_is_said_of_it():
    settings = {"evaluation": {"period": 5_000}, "report": {"period": 1_000}, "checkpoint": {"period": 7_000}}
    settings |= {"ranks": {"drift_check_period": 1_300}}
    plan, plain = (Plan(config(learner={"overlap": overlap}, **settings), 3) for overlap in (True, False))
    asked = ("evaluates_at", "reports_at", "checkpoints_at", "checks_drift_at")
    for cycle in range(plan.cycles):
        assert plan.finishes_phase_at(cycle) == any(getattr(plan, name)(cycle) for name in asked)
        assert plain.finishes_phase_at(cycle)
    assert plan.finishes_phase_at(plan.cycles - 1)


@pytest.mark.parametrize(
    ("vote", "train", "size", "expected"),
    #                           total steps after the first cycles that vote
    [(500, 64, 1, [512, 1_024, 1_536]), (500, 64, 3, [528, 1_032, 1_536]), (64, 64, 1, [64, 128, 192]),
     (1, 64, 1, [64, 128, 192]), (500, 512, 8, [512, 1_024, 1_536]), (500, 64, 128, [1_024, 2_048, 3_072])],
)  # fmt: skip
def test_ranks_vote_where_phases_begin_so_that_more_of_them_do_not_vote_more_often_than_they_learn(
    vote, train, size, expected
):
    capacity = {"capacity": 1_000_000}
    learner = {"train_period": train, "learn_start": 10_240}
    plan = Plan(config(ranks={"vote_period": vote}, learner=learner, replay=capacity), size)
    voted = [cycle for cycle in range(plan.cycles) if plan.votes_at(cycle)]
    assert [plan.total_steps_after(cycle) for cycle in voted][:3] == expected
    phases = [cycle for cycle in voted if plan.total_steps_after(cycle) > 11_000]
    assert phases
    assert all(plan.learns_at(cycle) for cycle in phases)


def test_the_last_cycle_reports():
    plan = Plan(config(total_steps=1_500, report={"period": 1_000}), 3)
    assert [c for c in range(plan.cycles) if plan.reports_at(c)][-1] == plan.cycles - 1


def test_epsilon_falls_with_total_steps_whatever_the_size():
    agent = {"epsilon_start": 1.0, "epsilon_end": 0.1, "epsilon_steps": 9_000}
    for size in (1, 2, 3, 8):
        plan = Plan(config(agent=agent), size)
        #             around step  epsilon
        for steps, expected in [(500, 1.0), (4_500, 0.55), (9_000, 0.1), (40_000, 0.1)]:
            assert plan.epsilon_at(steps // plan.steps_per_cycle) == pytest.approx(expected, abs=0.01)


def test_the_epsilon_ladder_spans_the_environments_of_all_ranks():
    plan = Plan(config(agent={"epsilon_end": 0.4, "epsilon_steps": 0, "epsilon_ladder": 7.0}), 2)
    cycle = plan.cycles - 1
    ladder = np.concatenate([plan.epsilons_at(cycle, rank) for rank in range(2)])
    assert ladder == pytest.approx([0.4 ** (1 + 7 * i / 15) for i in range(16)])


def test_the_learning_rate_is_scaled_only_as_asked_and_warmed_up():
    #    scaling   size  factor
    for scaling, size, factor in [("none", 8, 1.0), ("sqrt", 4, 2.0), ("linear", 8, 8.0), ("linear", 1, 1.0)]:
        plan = Plan(config(ranks={"learning_rate_scaling": scaling, "warmup_steps": 10_000}), size)
        #                      before learning, halfway, at the end
        for steps, expected in [(960, 1.0), (5_952, 1 + (factor - 1) * 0.4952), (48_000, factor)]:
            cycle = steps // plan.steps_per_cycle - 1
            assert plan.learning_rate_at(cycle) == pytest.approx(1e-3 * expected)


def test_strong_scaling_never_changes_the_learning_rate():
    plan = Plan(config(ranks={"scaling": "strong", "learning_rate_scaling": "linear"}), 8)
    assert plan.learning_rate_factor == 1.0


def test_the_learning_rate_can_fall_to_a_fraction_at_the_end():
    plan = Plan(config(learner={"learning_rate": 0.01, "learning_rate_end": 0.1}), 1)
    assert plan.learning_rate_at(plan.cycles // 2 - 1) == pytest.approx(0.0055)
    assert plan.learning_rate_at(plan.cycles - 1) == pytest.approx(0.001)


def test_backward_passes_enlarge_the_batch_and_thin_out_the_updates():
    one, two = Plan(config(), 2), Plan(config(ranks={"backward_passes_per_step": 2}), 2)
    assert two.global_batch == 2 * one.global_batch
    assert two.updates_after(two.cycles - 1) == one.updates_after(one.cycles - 1) // 2


@pytest.mark.parametrize(
    ("empty", "least"),
    # A batch of 64 from 8 environments each on 2 ranks: 8 cycles of 16.
    [("no", 10_000), ("all", 11_000), ("joined", 10_128)],
)
def test_an_empty_replay_is_filled_before_anyone_learns(empty, least):
    plan = Plan(config(), 2, resumed_at=10_000, empty=empty)
    assert plan.first_cycle == 625
    learning = [plan.total_steps_after(c) for c in range(plan.first_cycle, plan.cycles) if plan.learns_at(c)]
    assert least <= learning[0] < least + 256 + 16


def test_a_replay_that_was_being_filled_is_filled_further():
    plan = Plan(config(), 2, resumed_at=10_000, learns_from=10_700)
    learning = [plan.total_steps_after(c) for c in range(plan.first_cycle, plan.cycles) if plan.learns_at(c)]
    assert learning[0] == 10_752  # the first multiple of 256 from there on
    assert Plan(config(), 2, resumed_at=10_000, empty="joined", learns_from=10_700).learns_from == 10_700


@pytest.mark.parametrize("empty", ["no", "all", "joined"])
def test_a_batch_may_be_larger_than_what_was_collected(empty):
    # Draws are with replacement: a rank needs one transition.
    plan = Plan(config(), 16, resumed_at=0 if empty == "no" else 2_048, empty=empty)
    assert (plan.global_batch, plan.learn_start, plan.grown()) == (1_024, 1_000, [])


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"learner": {"learn_start": 7}}, r"n_step = 1 .*learn_start 7 with 8 environments.*at least 8"),
        ({"agent": {"n_step": 200}}, r"n_step = 200.*at least 1600"),
        ({"replay": {"capacity": 500}}, r"must hold what the warm-up collects.*capacity 500"),
        (
            {"replay": {"capacity": 1_000}, "agent": {"n_step": 100}},
            r"room for at least 206 transitions.*at least 1648",
        ),
        ({"ranks": {"sync": "parameters", "compression": "fp16"}}, r"ranks.sync parameters sends none.*at none"),
        ({"agent": {"network": "mine:model", "dueling": True}}, r"layers of mine:model are its own.*your model"),
        ({"ranks": {"silence_seconds": None, "stall_seconds": 60.0}}, r"needs the watchdog.*Received: 60"),
    ],
)
def test_settings_that_cannot_work_together_are_refused_on_any_number_of_ranks(sections, message):
    for size in (1, 8):
        with pytest.raises(InputError, match=message):
            Plan(config(**sections), size)


def test_the_warm_up_grows_to_the_n_steps_of_the_environments_of_all_ranks_and_says_so():
    one, two = (Plan(config(agent={"n_step": 100}), size) for size in (1, 2))
    assert (one.learn_start, one.grown()) == (1_000, [])
    assert two.learn_start == 1_600
    assert two.describe()["grown"] == (
        "the warm-up takes 1,600 total steps instead of 1,000, 100 of each of the 16 environments"
    )
    first = next(cycle for cycle in range(two.cycles) if two.learns_at(cycle))
    assert two.total_steps_after(first) > 1_600
    assert not two.ends_warm_up_at(98)
    assert two.ends_warm_up_at(99)
    assert (two.epsilon_at(99), two.learning_rate_at(99)) == (1.0, 1e-3)
    assert two.epsilon_at(100) < 1.0


def test_rings_grow_to_what_an_n_step_transition_needs():
    sections = {"replay": {"capacity": 2_000}, "agent": {"n_step": 3}, "env": {"frame_stack": 2}}
    #    size  slots  grown
    for size, slots, grown in [(1, 250, False), (17, 14, False), (18, 14, True), (512, 14, True)]:
        plan = Plan(config(**sections), size)
        assert plan.slots_per_env == slots
        assert any("the replay holds" in text for text in plan.grown()) == grown


def test_a_run_goes_on_to_its_least_number_of_updates_but_never_on_one_rank():
    learner = {"min_updates": 3_000, "train_period": 64}
    #    total steps  size  updates: 49,000 / 2 over the ranks, or 3,000, or those of one rank, to the last multiple of 64
    for total_steps, size, expected in [(50_000, 1, 24_492), (50_000, 4, 6_123), (50_000, 64, 3_000), (2_000, 1, 492),
                                        (2_000, 8, 492), (900, 8, 0)]:  # fmt: skip
        plan = Plan(config(total_steps=total_steps, learner=learner), size)
        updates = plan.updates_after(plan.cycles - 1)
        assert expected <= updates <= 1.03 * expected, (total_steps, size)
        assert (plan.total_steps > total_steps) == any("the run takes" in text for text in plan.grown())
        assert (plan.total_steps > total_steps) == (size in (8, 64) and expected > 0)
    strong = Plan(config(learner=learner, ranks={"scaling": "strong"}), 8)
    assert (strong.total_steps, strong.grown()) == (50_000, [])


@pytest.mark.parametrize(
    ("size", "sections", "names"),
    [
        (1, {}, None),
        (8, {}, None),
        (8, {"ranks": {"warmup_steps": 100}}, "--ranks.warmup-steps, since the learning rate does not grow here"),
        (8, {"ranks": {"warmup_steps": 100, "learning_rate_scaling": "sqrt"}}, None),
        (1, {"ranks": {"compression": "fp16", "stall_seconds": 9.0}},
         "--ranks.compression and --ranks.stall-seconds, since there is one rank"),
        (2, {"ranks": {"compression": "fp16", "stall_seconds": 9.0}}, None),
        (2, {"agent": {"network": "m:f", "hidden": (9,)}}, "--agent.hidden, since the layers of m:f are its own"),
        (2, {"checkpoint": {"compress": True, "save_replay": False}},
         "--checkpoint.compress, since it is for the replay, which is not saved"),
    ],
)  # fmt: skip
def test_the_plan_tells_of_settings_without_effect(size, sections, names):
    assert Plan(config(**sections), size).describe().get("without effect") == names


def test_what_was_due_where_a_run_stopped_within_a_cycle_of_more_ranks_is_made_up_for():
    #  640 steps per cycle: from 4,504 the first that is counted anew ends at 5,760
    sections = {"env": {"envs_per_rank": 64}, "evaluation": {"period": 5_000}, "learner": {"learn_start": 2_000}}
    plan = Plan(config(**sections), 10, resumed_at=4_504)
    assert (plan.first_cycle, plan.total_steps_after(plan.first_cycle)) == (8, 5_760)
    assert plan.evaluates_at(8)
    assert not Plan(config(**sections), 10, resumed_at=5_120).evaluates_at(8)


def test_people_see_when_the_target_network_is_no_older_than_the_network():
    learner = {"target_period": 256, "samples_per_insert": 8, "batch_size": 64, "learn_start": 4_000}
    told = [Plan(config(learner=learner), size).describe()["target network"] for size in (1, 8, 40)]
    assert told == ["a copy after every 32 updates", "a copy after every 4 updates", "a copy after every update"]


def test_people_read_whole_numbers_and_one_rank():
    one = Plan(config(learner={"target_period": 80_000, "samples_per_insert": 1}), 1).describe()
    assert one["environment"] == "CartPole-v1, 1 rank x 8 = 8 copies"
    assert one["global batch"] == "1 rank x 64 = 64 (weak scaling)"
    assert one["target network"] == "a copy after every 1,250 updates"
    assert one["learning rate"] == "0.001 (not scaled)"
    assert one["averaging"] == "none, on one rank"
    ranks = {"learning_rate_scaling": "sqrt", "warmup_steps": 10_000}
    many = Plan(config(ranks=ranks, learner={"learn_start": 20_000, "batch_size": 256}), 64).describe()
    assert many["environment"] == "CartPole-v1, 64 ranks x 8 = 512 copies"
    assert many["global batch"] == "64 ranks x 256 = 16,384 (weak scaling)"
    assert many["learning rate"] == "0.008 = 0.001 x 8 (sqrt scaling, after a warm-up of 10,000 total steps)"


@pytest.mark.parametrize("name", presets())
@pytest.mark.parametrize("size", [1, 2, 3, 8, 16, 64, 512])
@pytest.mark.parametrize("scaling", ["weak", "strong"])
def test_every_preset_can_be_carried_out_on_any_number_of_ranks(name, size, scaling):
    preset = load_preset(name)
    ranks = preset.ranks.model_copy(update={"scaling": scaling})
    given = preset.model_copy(update={"ranks": ranks})
    if scaling == "strong" and preset.env.envs_per_rank % size:
        with pytest.raises(InputError, match=rf"multiple of the number of ranks.*{preset.env.envs_per_rank} on {size}"):
            Plan(given, size)
        return
    plan = Plan(given, size)
    learning = [plan.updates_at(cycle) for cycle in range(plan.cycles)]
    assert sum(each > 0 for each in learning) >= 8
    assert sum(learning) == plan.updates_to_come()[0] >= (50 if name == "identity" else 8)
    assert max(learning) <= plan.updates_per_phase
    # Each environment has taken the steps of a whole transition before the first update.
    assert learning.index(next(filter(None, learning))) >= preset.agent.n_step
    assert plan.slots_per_env >= 2 * (preset.agent.n_step + preset.env.frame_stack + 2)
    assert plan.describe()
    if size == 1:
        assert (plan.grown(), plan.total_steps, plan.learn_start) == (
            [],
            preset.total_steps,
            preset.learner.learn_start,
        )


@pytest.mark.parametrize("name", presets())
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("empty", ["no", "all", "joined"])
def test_the_updates_that_are_announced_are_those_that_will_be_made(name, size, empty):
    preset = load_preset(name)
    for resumed_at in (0, preset.total_steps // 2):
        plan = Plan(preset, size, resumed_at, empty if resumed_at else "no")
        made = sum(plan.updates_at(cycle) for cycle in range(plan.first_cycle, plan.cycles))
        assert plan.describe()["updates"].startswith(f"{made:,} in about")
