"""`hvd-dqn plan`: what a job of any size would do and take, told without starting it."""

import json
import math
import re
import subprocess
import sys

import pytest

from hvd_dqn.bench import forecast
from hvd_dqn.bench.forecast import share_of, verdict
from hvd_dqn.commands import plan as command
from hvd_dqn.commands.presets import sizes
from hvd_dqn.config_files import configure, load_preset, presets
from hvd_dqn.errors import InputError
from hvd_dqn.ranks.world import Solo
from hvd_dqn.training.plan import Plan
from tests.ranks import ROOT, run

# Runs the command in this process, and says which libraries it has loaded.
QUICK = """
import sys
from hvd_dqn import cli
cli.PATIENCE = 0  # the other ranks are not there
try:
    cli.run_command(sys.argv[1:])
finally:
    print("loaded:", *[name for name in ("tensorflow", "horovod", "mpi4py") if name in sys.modules])
"""


def quickly(*words: str, **env: str) -> subprocess.CompletedProcess:
    return run([sys.executable, "-c", QUICK, *words], cwd=ROOT, PYTHONPATH=str(ROOT), **env)


@pytest.mark.parametrize(
    ("words", "code", "line"),
    [
        ("plan cartpole --ranks 512 --check --run-dir runs/x --resume", 2, r"nothing to resume in runs/x"),
        ("plan cartpole --ranks 512 --check --seed 3", 0, ""),
        ("plan cartpole --ranks 3 --check --ranks.scaling strong", 2, r"`env.envs_per_rank`.*8 on 3 ranks"),
        ("plan cartpole --ranks 0", 2, r"`--ranks` must be a whole number, at least 1"),
        ("plan cartpol", 2, r"no preset 'cartpol'"),
        ("plan cartpole --rank 3", 2, r"no option `--rank`. Did you mean `--ranks`"),
    ],
)
def test_a_plan_is_checked_before_anything_large_is_loaded(words, code, line):
    # Also inside a job: the command starts nothing.
    done = quickly(*words.split(), OMPI_COMM_WORLD_SIZE="4", OMPI_COMM_WORLD_RANK="0")
    assert (done.returncode, done.stdout) == (code, "loaded:\n")
    assert len(done.stderr.splitlines()) == (code != 0)
    assert re.search(line, done.stderr)


@pytest.mark.parametrize(
    "launched",
    [
        {"OMPI_COMM_WORLD_SIZE": "3", "OMPI_COMM_WORLD_RANK": "{rank}"},
        {"HOROVOD_SIZE": "3", "HOROVOD_RANK": "{rank}"},
        {"SLURM_STEP_NUM_TASKS": "3", "SLURM_PROCID": "{rank}", "PMIX_RANK": "{rank}"},
    ],
)
@pytest.mark.parametrize("rank", [0, 2])
def test_ranks_refuse_what_they_cannot_carry_out_before_they_connect(rank, launched):
    env = {name: value.format(rank=rank) for name, value in launched.items()}
    done = quickly("train", "cartpole", "--ranks.scaling", "strong", **env)
    assert (done.returncode, done.stdout) == (2, "loaded:\n")
    assert ("8 on 3 ranks" in done.stderr) == (rank == 0)
    assert len(done.stderr.splitlines()) == (rank == 0)


def test_what_is_wrong_on_one_host_only_is_left_to_the_connected_ranks(tmp_path):
    # It could be this rank's alone, and the others would wait for it.
    for words in (["cartpol"], ["--config", str(tmp_path / "nothing.yaml")], ["cartpole", "--help"], ["cartpole"]):
        command.check_size(words, 3)
    with pytest.raises(InputError, match=r"8 on 3 ranks"):
        command.check_size(["cartpole", "--ranks.scaling", "strong"], 3)


@pytest.mark.parametrize("name", presets())
@pytest.mark.parametrize("size", [1, 2, 8, 64, 512])
@pytest.mark.parametrize("scaling", ["weak", "strong"])
def test_the_measured_share_is_what_a_rank_of_the_job_does(name, size, scaling):
    config = configure(load_preset(name), {"ranks.scaling": scaling})
    if scaling == "strong" and config.env.envs_per_rank % size:
        return
    whole = Plan(config, size)
    share = Plan(share_of(whole), 1)
    assert (share.envs, share.global_batch) == (whole.envs_per_rank, whole.batch_per_rank)
    assert share.steps_per_phase * size == whole.steps_per_phase
    assert abs(share.updates_per_phase - whole.updates_per_phase) <= 1
    assert share.grown() == []
    learning = [cycle for cycle in range(2_000) if share.learns_at(cycle)][:6]
    assert len(learning) == 6
    assert share.config.learner.xla is (None if size == 1 else False)


def test_the_forecast_adds_up(monkeypatch, capsys):
    monkeypatch.setattr(forecast, "SECONDS", 0.2)
    words = ["identity", "--ranks", "64", "--ranks-per-node", "24", "--checkpoint.keep", "2", "--json"]
    command.run(words, Solo())
    found = json.loads(capsys.readouterr().out)
    plan = Plan(load_preset("identity"), 64)
    assert (found["preset"], found["ranks"], found["nodes"]) == ("identity", 64, 3)
    assert found["plan"]["global batch"] == "64 ranks x 32 = 2,048 (weak scaling)"
    memory, disk, time = found["memory"], found["disk"], found["time"]
    # A state of four bytes in each of 15 slots; action, reward, step type and episode step are 17 B more.
    assert memory["replay"] == 4 * (plan.slots_per_env * (4 + 17) + 8)
    parameters = 4 * 32 + 32 + 32 * 4 + 4
    assert disk["per_rank"] == memory["replay"]
    # Online and target network, two moments, and the number of steps; then the gradient and the message.
    assert disk["checkpoint"] - 64 * disk["per_rank"] == 4 * 4 * parameters + 8
    assert memory["networks"] == 6 * 4 * parameters + 8
    # Two updates of 32: observations and rewards are four bytes, actions 8, discounts 4; twice.
    assert plan.updates_per_phase == 2
    assert memory["minibatches"] == 2 * 2 * 32 * (4 + 4 + 8 + 4 + 4)
    assert 50e6 < memory["program"] < 5e9
    assert memory["rank"] == sum(memory[name] for name in ("program", "networks", "replay", "minibatches"))
    assert memory["node"] == 24 * memory["rank"]
    assert disk["files"] == 2 * 64 + 3
    assert disk["run"] == 3 * disk["checkpoint"] + 4 * 4 * parameters + 8
    parts = found["phase"]["parts"]
    assert time["efficiency"] == pytest.approx(parts["work"] / sum(parts.values()))
    updates = plan.updates_to_come()[0]
    assert time["seconds"] >= updates / 2 * sum(parts.values())
    assert time["steps_per_second"] == pytest.approx(plan.total_steps / time["seconds"])
    assert f"only {updates} updates of 2,048 transitions" in found["verdict"]
    shown = command.rows(found, plan.config)
    assert shown["memory"].endswith("per node, on 3 nodes")
    assert "131 files" in shown["disk"]


def test_a_slower_network_makes_a_job_longer_and_less_efficient(monkeypatch):
    monkeypatch.setattr(forecast, "SECONDS", 0.2)
    share = forecast.measure_share(Plan(load_preset("identity"), 64))
    monkeypatch.setattr(forecast, "measure_share", lambda plan: share)
    plan = Plan(load_preset("identity"), 64)
    near, far, slow = (
        forecast.forecast(plan, *given[:1], latency=given[1]) for given in ((64, None), (8, None), (8, 1e6))
    )
    assert near["nodes"] == 1
    assert near["time"]["efficiency"] > far["time"]["efficiency"] > slow["time"]["efficiency"]
    assert near["time"]["seconds"] < far["time"]["seconds"] < slow["time"]["seconds"]
    assert slow["efficient_ranks"] == 1
    assert "Most of it is lost" in slow["verdict"]


@pytest.mark.parametrize(
    ("size", "efficiency", "updates", "efficient_ranks", "words"),
    [
        (1, 1.0, 10, 1, ["waits for nobody"]),
        (8, 0.9, 5_000, 8, ["90% of", "used well"]),
        (8, 0.6, 5_000, 4, ["much for what it gains", "up to 4 ranks keep 80%", "--ranks.sync parameters"]),
        (8, 0.2, 5_000, 1, ["Most of it is lost: larger --learner.batch-size"]),
        (512, 0.9, 10, 512, ["used well", "But only 10 updates of 32,768 transitions"]),
    ],
)
def test_whether_so_many_ranks_make_sense_is_said_in_words(size, efficiency, updates, efficient_ranks, words):
    said = verdict(Plan(load_preset("cartpole"), size), efficiency, updates, efficient_ranks)
    for each in words:
        assert each in said


def test_numbers_are_shown_with_their_units():
    for number, expected in [(0, "0 B"), (999, "999 B"), (1_000, "1 kB"), (51_480, "51.5 kB"), (7.1e9, "7.1 GB"),
                             (3.6e12, "3.6 TB"), (5e15, "5e+03 TB")]:  # fmt: skip
        assert command._bytes(number) == expected
    for seconds, expected in [(3, "3 s"), (119.4, "119 s"), (600, "10 min"), (9_000, "2.5 h")]:
        assert command._duration(seconds) == expected


@pytest.mark.parametrize("name", presets())
def test_presets_tells_on_how_many_ranks_each_runs(name):
    config = load_preset(name)
    envs = config.env.envs_per_rank
    told = sizes(config)
    assert f"{', '.join(str(n) for n in (1, 2, 4, 8) if n < envs)} or {envs} with strong" in told
    above = int(told.split("above ")[1].split()[0])
    assert not any("warm-up" in text for text in Plan(config, above).grown())
    assert any("warm-up" in text for text in Plan(config, above + 1).grown())
    assert math.gcd(envs, config.learner.batch_size) == envs
