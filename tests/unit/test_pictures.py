"""The benchmarks' pictures and tables, and the steps to the target: from files as the benchmarks leave them."""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

from tests.benchmarks import pictures, steps, tables
from tests.learning import table

TOLD = {
    "benchmark": "steps",
    "command": "python -m it",
    "commit": "c0ffee",
    "machine": {"cpu": "a CPU", "cores": 2},
    "rounds": 3,
}


def step_rows(*medians: tuple[int, str, float]) -> list[dict]:
    def run(value: float) -> dict:
        return {"seed": 1, "total_steps": value if math.isfinite(value) else None, "commit": "c0ffee"}

    return [{"preset": "cartpole", "ranks": n, "scaling": kind, "runs": [run(value)]} for n, kind, value in medians]


def test_steps_are_held_against_one_ranks():
    #                          ranks  scaling   steps     ratio  met
    expected = [
        (1, "weak", 1000, 1.0, None),
        (4, "weak", 2000, 2.0, None),
        (8, "weak", 1250, 1.25, True),
        (8, "strong", 1150, 1.15, False),
        (8, "weak", math.inf, None, False),
    ]
    found = steps.summary(step_rows(*(row[:3] for row in expected)))
    for row, (_, _, value, ratio, met) in zip(found, expected, strict=True):
        assert row["over_one_rank"]["ratio"] == ratio
        assert row["over_one_rank"].get("target", {}).get("met") == met
        assert row["reached"] == math.isfinite(value)
    json.dumps(found, allow_nan=False)


def test_what_does_not_divide_is_not_allowed():
    assert steps.allowed("cartpole", 8, "strong")
    assert not steps.allowed("cartpole", 3, "strong")
    assert steps.allowed("identity", 512, "weak")


def finished(folder: Path, returns: list[float]) -> None:
    folder.mkdir(parents=True)
    about = {"seed": 1, "target_return": 475, "result": {"total_steps": 5000}}
    (folder / "run.json").write_text(json.dumps(about))
    lines = [f"{2500 * i},{value}" for i, value in enumerate(returns)]
    (folder / "evaluations.csv").write_text("\n".join(["total_steps,return_mean", *lines, ""]))


def test_a_run_is_made_once_and_has_reached_its_target_when_two_evaluations_say_so(tmp_path, monkeypatch):
    commands = []

    def run(command, **options):
        commands.append(command)
        finished(Path(command[-1]), [20, 480, 476] if "1" in command else [20, 470, 476])
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(table, "run", run)
    (tmp_path / "cartpole-2-strong-1").mkdir()
    (tmp_path / "cartpole-2-strong-1/run.json").write_text("{}")  # broken off
    for _ in range(2):
        made = table.trained("cartpole", 2, "strong", [1, 3], tmp_path)
    assert len(commands) == 2
    assert commands[0][:3] == ["horovodrun", "-np", "2"]
    assert [steps.reached(run)["total_steps"] for run in made] == [5000, None]
    assert steps.reached(made[0])["commit"] != "unknown"


def test_each_file_gives_its_table_with_command_and_commit_and_its_picture(tmp_path, monkeypatch, capsys):
    rows = steps.summary(step_rows((1, "weak", 1000), (8, "weak", math.inf), (8, "strong", 1100)))
    # As horovodrun prints it: the rank's name comes before the line.
    (tmp_path / "steps.json").write_text("[1,0]<stdout>:" + json.dumps({**TOLD, "left_out": ["x"], "results": rows}))
    monkeypatch.setattr(sys, "argv", ["pictures", "--results", str(tmp_path), "--out", str(tmp_path)])
    pictures.main()
    assert [path.name for path in tmp_path.glob("*.png")] == ["steps.png"]
    text = capsys.readouterr().out
    assert "| cartpole | 8 | strong |" in text
    assert "`python -m it` at commit c0ffee" in text


def test_two_ranks_are_held_against_what_is_wanted_of_them():
    def row(case: str, ranks: int, sync: str) -> dict:
        kind = {"case": case, "ranks": ranks, "scaling": "weak", "sync": sync, "oversubscribed": False, "batch": 64}
        same = dict.fromkeys(("median", "low", "high"), 0.8)
        shares = {"update": 0.5, "communicate": 0.25, "idle": 0.1}
        return {
            **kind,
            "steps_per_second": same,
            "independent_steps_per_second": same,
            "efficiency": same,
            "shares": shares,
        }

    #            case           ranks  averaging     efficiency
    expected = [
        ("cartpole-16", 2, "gradients", "80 (80 to 80), ≥ 75 met"),
        ("cartpole-zoo", 2, "gradients", "80 (80 to 80), ≥ 85 **not met**"),
        ("cartpole-16", 2, "parameters", "80 (80 to 80), ≥ 95 **not met**"),
        ("cartpole-16", 4, "gradients", "80 (80 to 80)"),
    ]
    _, *lines = tables.scaling_table({"results": [row(*case[:3]) for case in expected]})
    assert [line[-2] for line in lines] == [case[3] for case in expected]
    assert [line[-1] for line in lines] == ["25, 10 %"] * 4
