"""`hvd-dqn bench`: what is asked for is what is measured."""

import json
from pathlib import Path

import pytest

from hvd_dqn.bench import allreduce as bench_allreduce
from hvd_dqn.bench import learner as bench
from hvd_dqn.bench import loop as bench_loop
from hvd_dqn.bench import project as bench_project
from hvd_dqn.bench import scaling as bench_scaling
from hvd_dqn.commands import bench as bench_commands
from hvd_dqn.errors import InputError
from hvd_dqn.ranks.world import Solo

WORLD = Solo()
LOOP = {"case": "pixels", "total_steps": None, "batch": None, "envs": None, "sync": "gradients", "overlap": False}
LOOP |= {"gate": False}
SCALING = {"scaling": "both", "sync": "both", "total_steps": None, "rounds": 5}
PROJECT = {"sync": "gradients", "files": (), "latency": None, "bandwidth": None, "rounds": 3}


@pytest.mark.parametrize(
    ("words", "module", "named"),
    [
        ("learner", bench, {}),
        ("allreduce", bench_allreduce, {}),
        ("loop pixels", bench_loop, LOOP),
        (
            "loop pixels --total-steps 9 --batch 8 --envs 7 --sync parameters --overlap --gate",
            bench_loop,
            {"case": "pixels", "total_steps": 9, "batch": 8, "envs": 7, "sync": "parameters"}
            | {"overlap": True, "gate": True},
        ),
        ("scaling", bench_scaling, {"case": "cartpole-16", "ranks": (1, 2, 4, 8), **SCALING}),
        (
            "scaling --case pixels --ranks 3,5 --scaling strong --sync parameters --total-steps 9 --rounds 2",
            bench_scaling,
            {"case": "pixels", "ranks": (3, 5), "scaling": "strong", "sync": "parameters"}
            | {"total_steps": 9, "rounds": 2},
        ),
        ("project", bench_project, {"case": "cartpole-16", "ranks": 512, **PROJECT}),
        (
            "project --case pixels --ranks 64 --sync parameters --files a b --latency 2 --bandwidth 12.5 --rounds 1",
            bench_project,
            {"case": "pixels", "ranks": 64, "sync": "parameters", "files": (Path("a"), Path("b"))}
            | {"latency": 2.0, "bandwidth": 12.5, "rounds": 1},
        ),
    ],
)  # fmt: skip
def test_every_option_reaches_the_measurement(words, module, named, monkeypatch, capsys):
    given, result = [], {"benchmark": words.split()[0]}
    monkeypatch.setattr(module, "measure", lambda *values, **named: given.append((values, named)) or result)
    bench_commands.run([*words.split(), "--json"], WORLD)
    assert given == [((WORLD,), named)]
    assert json.loads(capsys.readouterr().out) == result


def test_only_a_process_alone_waits_at_a_gate():
    two = Solo()
    two.size = 2
    with pytest.raises(InputError, match="--gate is for independent processes"):
        bench_commands.run(["loop", "pixels", "--gate"], two)
