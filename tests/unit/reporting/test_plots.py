"""Learning curves from run directories: what is put together, what the picture says, and what is no run."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.figure import Figure

from hvd_dqn.errors import InputError
from hvd_dqn.reporting.plots import PALETTE, Curve, group_by_seed, over_seeds, plot, read_run
from hvd_dqn.reporting.writers import CsvWriter
from hvd_dqn.training.ledger import COLUMNS

EVALUATION_COLUMNS = (
    "total_steps", "seconds", "episodes", "return_mean", "return_std", "return_min", "return_max", "length_mean"
)  # fmt: skip
STEPS = (1000, 2000, 3000, 4000)


@pytest.fixture
def make_run(tmp_path):
    def make(name="run", *, steps=STEPS, evaluated=(2000, 4000), first_return=1000, **described):
        path = tmp_path / name
        path.mkdir()
        run = {"size": 1, "preset": "cartpole", "env": "CartPole-v1", "seed": 0, "target_return": 475.0} | described
        (path / "run.json").write_text(json.dumps(run))
        metrics = CsvWriter(path / "metrics.csv")
        for step in steps:
            row = dict.fromkeys(COLUMNS, 0.0) | {"total_steps": step, "seconds": step / 100}
            metrics.write(row | {"return_mean": step / 10 if step >= first_return else float("nan")})
        evaluations = CsvWriter(path / "evaluations.csv", EVALUATION_COLUMNS)
        for step in evaluated:
            row = dict.fromkeys(EVALUATION_COLUMNS, 20.0) | {"total_steps": step, "seconds": step / 100}
            evaluations.write(row | {"return_mean": step / 9, "return_min": step / 12, "return_max": step / 8})
        return path

    return make


def texts(svg):
    """The texts of an SVG that matplotlib drew: it keeps each in a comment beside its glyphs."""
    return re.findall(r"<!-- (.*?) -->", svg.read_text())


def test_every_kind_of_run_becomes_a_picture(make_run, tmp_path):
    cases = {
        "ordinary": [make_run("ordinary")],
        "one row": [make_run("one-row", steps=(1000,), evaluated=(1000,))],
        "one row, no evaluation": [make_run("no-evaluation", steps=(1000,), evaluated=())],
        "no episode ended at first": [make_run("late", first_return=3000)],
        "no episode ever ended": [make_run("never", first_return=10**9, evaluated=(), target_return=None)],
        "no rows": [make_run("empty", steps=(), evaluated=())],
        "three sizes, two seeds": [make_run(f"{n}-{s}", size=n, seed=s) for n in (1, 2, 4) for s in (0, 1)],
        "seeds without a step in common": [make_run("a", evaluated=(1000,)), make_run("b", seed=1, evaluated=(3000,))],
        "more runs than colours": [make_run(f"same-{i}") for i in range(len(PALETTE) + 2)],
    }
    for name, runs in cases.items():
        picture = tmp_path / f"{name}.png"
        plot(runs, picture)
        content = picture.read_bytes()
        assert content.startswith(b"\x89PNG"), name
        assert len(content) > 5000, name


def test_a_run_without_evaluations_csv_is_drawn_from_its_training_returns(make_run, tmp_path):
    path = make_run()
    (path / "evaluations.csv").unlink()
    plot([path], tmp_path / "curve.svg")
    assert "training, exploring" in texts(tmp_path / "curve.svg")
    assert "evaluation" not in texts(tmp_path / "curve.svg")


def test_the_picture_names_axes_with_units_the_target_and_the_environment(make_run, tmp_path):
    plot([make_run()], tmp_path / "curve.svg")
    expected = {"total steps", "wall time (s)", "return per episode", "target 475", "CartPole-v1", "evaluation"}
    assert expected <= set(texts(tmp_path / "curve.svg"))


def test_wall_time_is_given_in_the_unit_that_suits_it(make_run, tmp_path, monkeypatch):
    drawn, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *to, **how: drawn.append(figure) or save(figure, *to, **how))
    #  total steps, at 100 per second
    for last, unit, at in [(10_000, "s", 100), (100_000, "min", 1_000 / 60), (10_000_000, "h", 100_000 / 3_600)]:
        plot([make_run(f"run-{last}", steps=(1_000, last), target_return=None)], tmp_path / "curve.svg")
        assert f"wall time ({unit})" in texts(tmp_path / "curve.svg")
        steps, times = (max(line.get_xdata()[-1] for line in axes.lines) for axes in drawn[-1].axes)
        assert (steps, times) == (last, pytest.approx(at))


def test_ranks_are_colours_and_seeds_are_bands(make_run, tmp_path):
    runs = [make_run(f"{size}-{seed}", size=size, seed=seed) for size in (2, 1) for seed in (0, 1, 2)]
    plot(runs, tmp_path / "curve.svg")
    found = texts(tmp_path / "curve.svg")
    assert {"1 rank (3 seeds)", "2 ranks (3 seeds)", "lowest to highest seed"} <= set(found)
    svg = tmp_path.joinpath("curve.svg").read_text().lower()
    assert [color.lower() in svg for color in PALETTE] == [True, True] + [False] * (len(PALETTE) - 2)


def test_groups_are_labelled_by_what_tells_them_apart(make_run):
    a = {"size": 1, "seed": 0}
    for described, expected in [
        ([a], [""]),
        ([a, a | {"seed": 1}], ["mean of 2 seeds"]),
        ([a | {"size": 2}, a], ["1 rank", "2 ranks"]),
        ([a | {"size": 2, "scaling": "weak"}, a | {"size": 2, "scaling": "strong"}], ["strong", "weak"]),
        (
            [a | {"scaling": "weak"}, a | {"size": 2, "scaling": "weak"}, a | {"size": 2, "scaling": "strong"}],
            ["1 rank", "2 ranks, strong", "2 ranks, weak"],
        ),
        ([a | {"preset": "mine"}, a], ["cartpole", "mine"]),
        ([a | {"env": "Acrobot-v1"}, a | {"size": 2}], ["Acrobot-v1, 1 rank", "CartPole-v1, 2 ranks"]),
        ([a, a], ["{0}", "{1}"]),  # the same seed twice: other settings differ, so the names must tell
    ]:
        names = [f"run-{id(expected)}-{i}" for i in range(len(described))]
        runs = [read_run(make_run(name, **one)) for name, one in zip(names, described, strict=True)]
        assert [one.label for one in group_by_seed(runs)] == [label.format(*names) for label in expected]


def test_the_mean_over_seeds_ends_where_the_first_of_them_stopped():
    def curve(steps, seconds, mean):
        return Curve(*(np.array(values, float) for values in (steps, seconds, mean, mean, mean)))

    found = over_seeds([
        curve([10, 20, 30], [1, 2, 3], [0, 100, 200]),
        curve([10, 20], [3, 4], [50, 300]),
    ])  # fmt: skip
    for name, expected in [
        ("total_steps", [10, 20]),
        ("seconds", [2, 3]),
        ("mean", [25, 200]),
        ("low", [0, 100]),
        ("high", [50, 300]),
    ]:
        np.testing.assert_array_equal(getattr(found, name), expected, err_msg=name)


def test_reports_without_an_episode_are_left_out_and_of_two_evaluations_at_one_step_the_last_counts(make_run):
    path = make_run(first_return=3000)
    with (path / "evaluations.csv").open("a") as file:
        file.write("4000,41,100,500,0,490,510,200\n")
    run = read_run(path)
    assert run.training.total_steps.tolist() == [3000, 4000]
    assert run.evaluations.total_steps.tolist() == [2000, 4000]
    assert (run.evaluations.mean[-1], run.evaluations.low[-1], run.evaluations.high[-1]) == (500, 490, 510)


def test_what_is_no_run_is_refused_in_one_line_that_names_it(make_run, tmp_path):
    def spoiled(name, file, content):
        path = make_run(name)
        (path / file).write_text(content)
        return path

    gone = make_run("gone")
    (gone / "metrics.csv").unlink()
    (tmp_path / "bare").mkdir()
    for path, complaint in [
        (tmp_path / "nowhere", r"nowhere is no run: it has no readable run\.json"),
        (tmp_path / "bare", r"bare is no run"),
        (gone, r"Cannot read .*gone/metrics\.csv"),
        (spoiled("cut", "run.json", "{"), r"cut/run\.json does not describe a run"),
        (spoiled("list", "run.json", "[1]"), r"list/run\.json does not describe a run"),
        (spoiled("sizeless", "run.json", "{}"), r"sizeless/run\.json does not describe a run: KeyError 'size'"),
        (spoiled("other", "metrics.csv", "total_steps,loss\n1,2\n"), r"other/metrics\.csv has no column return_mean"),
        (spoiled("words", "evaluations.csv", "total_steps\nmany\n"), r"words/evaluations\.csv, line 2: `total_steps`"),
    ]:
        with pytest.raises(InputError, match=complaint) as caught:
            plot([make_run(f"good-{path.name}"), path], tmp_path / "curve.png")
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "curve.png").exists()


def test_a_picture_that_cannot_be_written_is_one_clear_line(make_run, tmp_path):
    path = make_run()
    for output, complaint in [
        (tmp_path / "no" / "curve.png", r"Cannot write the picture .*No such file or directory"),
        (tmp_path / "curve.tiger", r"Cannot write the picture .*tiger"),
    ]:
        with pytest.raises(InputError, match=complaint):
            plot([path], output)


def test_plotting_needs_no_display_no_global_figures_and_no_tensorflow(make_run, tmp_path):
    program = (
        "import sys; from pathlib import Path; from hvd_dqn.reporting.plots import plot;"
        "plot([Path(sys.argv[1])], sys.argv[2]);"
        "print([name for name in ('matplotlib.pyplot', 'tensorflow') if name in sys.modules])"
    )
    command = [sys.executable, "-c", program, str(make_run()), str(tmp_path / "curve.png")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("[]\n", "")
