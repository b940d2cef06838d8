"""`hvd-dqn bench`: what is asked for is what is measured."""

import io
import json
import sys
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
SCALING = {"scalings": ("weak", "strong"), "syncs": ("gradients", "parameters"), "total_steps": None, "rounds": 5}
PROJECT = {"sync": "gradients", "files": (), "latency": None, "bandwidth": None, "rounds": 3}


@pytest.mark.parametrize(
    ("words", "module", "values", "named"),
    [
        ("learner", bench, (WORLD,), {}),
        ("allreduce", bench_allreduce, (WORLD,), {}),
        ("loop pixels", bench_loop, (WORLD,), LOOP),
        (
            "loop pixels --total-steps 9 --batch 8 --envs 7 --sync parameters --overlap",
            bench_loop, (WORLD,),
            {"case": "pixels", "total_steps": 9, "batch": 8, "envs": 7, "sync": "parameters", "overlap": True},
        ),
        ("scaling", bench_scaling, (), {"case": "cartpole-16", "ranks": [1, 2, 4, 8], **SCALING}),
        (
            "scaling --case pixels --ranks 3,5 --scaling strong --sync parameters --total-steps 9 --rounds 2",
            bench_scaling, (),
            {"case": "pixels", "ranks": [3, 5], "scalings": ("strong",), "syncs": ("parameters",)}
            | {"total_steps": 9, "rounds": 2},
        ),
        ("project", bench_project, (), {"case": "cartpole-16", "ranks": 512, **PROJECT}),
        (
            "project --case pixels --ranks 64 --sync parameters --files a b --latency 2 --bandwidth 12.5 --rounds 1",
            bench_project, (),
            {"case": "pixels", "ranks": 64, "sync": "parameters", "files": (Path("a"), Path("b"))}
            | {"latency": 2.0, "bandwidth": 12.5, "rounds": 1},
        ),
    ],
)  # fmt: skip
def test_every_option_reaches_the_measurement(words, module, values, named, monkeypatch, capsys):
    name, given = words.split()[0], []
    result = {"benchmark": name}
    function = "project_efficiency" if name == "project" else f"measure_{name}"
    monkeypatch.setattr(module, function, lambda *values, **named: given.append((values, named)) or result)
    bench_commands.run([*words.split(), "--json"], WORLD)
    ((received, received_named),) = given
    for helper in ("ready", "say"):
        received_named.pop(helper, None)
    assert (received, received_named) == (values, named)
    assert json.loads(capsys.readouterr().out) == result


def test_a_gated_measurement_waits_for_a_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("go\nmore\n"))
    monkeypatch.setattr(bench_loop, "measure_loop", lambda *_, ready, **__: ready() or {"left": sys.stdin.read()})
    bench_commands.run(["loop", "pixels", "--gate", "--json"], WORLD)
    ready, result = capsys.readouterr().out.splitlines()
    assert (ready, json.loads(result)) == ("ready", {"left": "more\n"})
    two = Solo()
    two.size = 2
    with pytest.raises(InputError, match="--gate is for independent processes"):
        bench_commands.run(["loop", "pixels", "--gate"], two)
