"""The comparisons with other projects: their sums and tables, without the projects."""

import json
from io import StringIO
from types import SimpleNamespace

import pytest
from rich.console import Console

from hvd_dqn.bench.learner import LEARNER_CASES
from hvd_dqn.bench.loop import case_config
from tests.benchmarks import compare, learner, loop, solve

NETWORKS = list(LEARNER_CASES)


def shown(table) -> str:
    console = Console(file=StringIO(), width=300)
    console.print(table)
    return console.file.getvalue()


def everywhere(value: float) -> dict[str, float]:
    return dict.fromkeys(NETWORKS, value)


def learner_round(ours: float, sb3: float | None) -> dict:
    def job(microseconds: float) -> dict:
        times = {"median": microseconds, "low": 0, "high": 0}
        row = {"microseconds_per_update": times, "microseconds_with_sampling": times}
        return {"commit": "c0ffee", "results": [{"network": name, **row} for name in NETWORKS]}

    found = {"one": job(ours), "two": job(2 * ours)}
    return found | ({"sb3": {"versions": {"sb3": "9"}, "microseconds": everywhere(sb3)}} if sb3 else {})


def test_ratios_are_formed_within_rounds():
    # 100 / 10, 30 / 10 and 80 / 20: their median is 4, while the ratio of the medians would be 8.
    made = [learner_round(10, 100), learner_round(10, 30), learner_round(20, 80)]
    found = learner.summary("mlp-64-64", made)["ratios"]["times as fast as SB3"]
    assert (found["median"], found["low"], found["high"]) == (4.0, 3.0, 10.0)


@pytest.mark.parametrize(("sb3", "word"), [(80.0, "≥ 8: met"), (79.0, "≥ 8: NOT MET")])
def test_the_table_says_whether_a_target_is_met(sb3, word):
    made = [learner_round(10, sb3)]
    result = compare.told("learner", made, results=[learner.summary("mlp-64-64", made)])
    assert word in shown(learner.table(json.loads(json.dumps(result))))


def test_a_peer_that_is_not_there_is_left_out_and_named(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(compare, "PYTHON", compare.HERE)  # exists wherever the tests do

    def run(command):
        asked.append(command[-1])
        return SimpleNamespace(returncode=int(command[-1] == "tianshou"))

    monkeypatch.setattr(compare, "run", run)
    assert compare.present(["sb3", "tianshou"]) == ["sb3"]
    assert asked == ["stable-baselines3", "tianshou"]
    assert "tianshou is left out" in capsys.readouterr().err
    made = [learner_round(10, None)]
    result = compare.told("learner", made, results=[learner.summary("mlp-64-64", made)])
    assert "SB3" not in shown(learner.table(result))


def test_every_round_begins_with_another_job():
    order = []
    jobs = {name: lambda name=name: order.append(name) or {} for name in "abc"}
    compare.rounds(jobs, 3)
    assert "".join(order) == "abcbcacab"


def test_the_peers_get_the_settings_of_our_cases():
    job = loop.job(case_config("cartpole-zoo", 1, total_steps=20_000))
    zoo = solve.ZOO["cartpole"]
    same = zoo.keys() - {"total_steps", "target_period"}
    assert {name: job[name] for name in same} == {name: zoo[name] for name in same}
    # Stable-Baselines3 copies the target while it steps: with a shorter period still once between phases.
    assert zoo["target_period"] < job["target_period"] == job["train_period"]
    job = loop.job(case_config("cartpole-16", 1))
    assert job["train_period"] / job["updates"] == 4  # an update per 4 steps


def test_a_run_that_never_gets_there_is_infinitely_long():
    def run(seconds: float, solved: bool) -> dict:
        return {"wall_seconds": seconds, "solved": solved, "total_steps": 1000 * seconds}

    runs = {
        "ours": [run(10, True), run(12, True), run(30, True)],
        "ours, two ranks": [run(9, True), run(400, False), run(400, False)],
        solve.ZOO_SETTINGS: [run(10, True), run(20, True), run(400, False)],
        "sb3": [run(300, False), run(80, True), run(240, False)],
    }
    found = solve.summary("cartpole", runs)
    assert found["summary"]["ours"]["seconds"] == {"median": 12, "low": 10, "high": 30}
    assert found["summary"]["ours, two ranks"]["seconds"] == {"median": None, "low": 9, "high": None}
    assert found["summary"]["sb3"]["seconds"] == {"median": None, "low": 80, "high": None}
    # What it spent on trying is the least that it would have needed; formed within a seed: 300 / 10, 80 / 12 and 240 / 30.
    of_one = found["ratios"]["ours: times as fast as sb3"]
    assert of_one == {"median": 8.0, "low": pytest.approx(80 / 12), "high": 30.0, "at_least": True}
    of_two = found["ratios"]["ours, two ranks: times as fast as sb3"]
    assert (of_two["median"], of_two["at_least"], of_two["target"]["met"]) == (0.0, False, False)
    as_the_zoo = found["ratios"][f"{solve.ZOO_SETTINGS}: times as fast as sb3"]
    assert (as_the_zoo["median"], as_the_zoo["target"]) == (4.0, {"sign": "≥", "limit": 6.0, "met": False})
    lander = solve.summary("lunarlander", {name: runs[name] for name in ("ours", "sb3")})
    result = compare.told("solve", results=[found, lander])
    text = shown(solve.table(json.loads(json.dumps(result | {"rounds": 3}, allow_nan=False))))
    assert "never (80 - never) s" in text


def test_the_runs_of_a_seed_follow_each_other_and_each_seed_begins_with_another(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(solve, "kept", lambda out, preset, name, seed: made.append((seed, name)) or {"seed": seed})
    found = solve.everyone("lunarlander", ["sb3"], [4, 5, 6], tmp_path)
    assert [seed for seed, _ in made] == [4, 4, 4, 5, 5, 5, 6, 6, 6]
    assert [name for _, name in made][::3] == ["ours", "ours, two ranks", "sb3"]
    assert all(runs == [{"seed": 4}, {"seed": 5}, {"seed": 6}] for runs in found.values())


def test_we_too_take_the_zoos_settings():
    zoo, ours = solve.ZOO["cartpole"], solve.zoo_settings("cartpole")
    assert ours.total_steps == zoo["total_steps"]
    assert ours.evaluation.target_return == 475
    same = {"batch": ours.learner.batch_size, "train_period": ours.learner.train_period}
    same |= {"hidden": list(ours.agent.hidden), "learning_rate": ours.learner.learning_rate}
    assert same == {name: zoo[name] for name in same}


def test_finished_runs_are_not_repeated(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(solve, "ask", lambda *what: made.append(what) or {"solved": True, "total_steps": 1})
    first, second = (solve.kept(tmp_path, "cartpole", "sb3", 1) for _ in range(2))
    assert made == [("cartpole", "sb3", 1)]
    assert first == second
    assert first["wall_seconds"] > 0
