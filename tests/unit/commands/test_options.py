"""The command line of `hvd-dqn train`: what is clear is taken, and the rest is refused in one line."""

import shlex

import pytest

from hvd_dqn.commands.options import EvaluateOptions, PlotOptions, parse, read_settings
from hvd_dqn.config import Config
from hvd_dqn.errors import InputError
from hvd_dqn.storage.run_directory import Run

#   words after `hvd-dqn train`                        setting                     its value
TAKEN = [
    ("cartpole --total-steps 1e6",                     "total_steps",              1_000_000),
    ("cartpole --total_steps 1_000_000",               "total_steps",              1_000_000),
    ("--total-steps=10 cartpole",                      "total_steps",              10),
    ("cartpole --evaluation.target-return -5",         "evaluation.target_return", -5.0),
    ("cartpole --evaluation.target_return None",       "evaluation.target_return", None),
    ("cartpole --learner.learning-rate 1e-3",          "learner.learning_rate",    0.001),
    ("cartpole --agent.hidden 64,32",                  "agent.hidden",             (64, 32)),
    ("cartpole --agent.hidden [64,32]",                "agent.hidden",             (64, 32)),
    ("cartpole --agent.hidden '[64, 32]'",             "agent.hidden",             (64, 32)),
    ("cartpole --agent.hidden 64, 32",                 "agent.hidden",             (64, 32)),
    ("cartpole --agent.hidden 64 32 --seed 1",         "agent.hidden",             (64, 32)),
    ("cartpole --agent.hidden 64",                     "agent.hidden",             (64,)),
    ("cartpole --agent.double no",                     "agent.double",             False),
    ("cartpole --env.kwargs '{\"map_name\": \"8x8\"}'",  "env.kwargs",               {"map_name": "8x8"}),
    ("cartpole --env.kwargs '{map_name: 8x8, x: 1}'",  "env.kwargs",               {"map_name": "8x8", "x": 1}),
    ("cartpole --env.kwargs '{config: {lanes: 4}}'",   "env.kwargs",               {"config": {"lanes": 4}}),
    ("cartpole --env.kwargs 'c={a: [4, 5]} d=null'",   "env.kwargs",               {"c": {"a": [4, 5]}, "d": None}),
    ("cartpole --env.wrappers A",                      "env.wrappers",             ("A",)),
    ("cartpole --env.wrappers A m.n:B",                "env.wrappers",             ("A", "m.n:B")),
    ("cartpole --env.wrappers A,B",                    "env.wrappers",             ("A", "B")),
    ("cartpole --env.wrappers '[A, {B: {s: [8, 4]}}]'", "env.wrappers",            ("A", {"B": {"s": [8, 4]}})),
    ("cartpole --env.wrappers '{B: {s: [8, 4]}}'",     "env.wrappers",             ({"B": {"s": [8, 4]}},)),
    ("cartpole --env.kwargs map_name=8x8 slip=false",  "env.kwargs",               {"map_name": "8x8", "slip": False}),
]  # fmt: skip


@pytest.mark.parametrize(("words", "name", "value"), TAKEN)
def test_what_is_clear_is_taken(words, name, value):
    _, _, config = read_settings(shlex.split(words))
    for part in name.split("."):
        config = getattr(config, part)
    assert config == value


#   words after `hvd-dqn train`              what the line says
REFUSED = [
    ("",                                     r"What shall be trained\? Name a preset \(acrobot, cartpole.*--config.*--env.id"),
    ("--seed 3",                             r"What shall be trained"),
    ("cartpole lunarlander",                 r"Name one preset\. Received: cartpole, lunarlander"),
    ("cartpole --seed 1 --seed 2",           r"`--seed` is given twice"),
    ("cartpole --agent.n_step 1 --agent.n-step 2", r"`--agent.n-step` is given twice"),
    ("cartpole --run-dir a --run_dir b",     r"`--run-dir` is given twice"),
    ("cartpole --resume --resume",           r"`--resume` is given twice"),
    ("cartpole --total-steps -5",            r"`total_steps` must be a whole number, at least 1\. Received: -5"),
    ("cartpole --total-steps many",          r"`total_steps` must be a whole number, at least 1\. Received: 'many'"),
    ("cartpole --seed yes",                  r"`seed` must be a whole number, at least 0\. Received: 'yes'"),
    ("cartpole --agent.loss hubert",         r"must be `huber` or `squared`\. Received: 'hubert'\. Did you mean `huber`"),
    ("cartpole --env.kwargs '{a: 1, a: 2}'", r"`env.kwargs`: `a` is given twice"),
    ("cartpole --env.kwargs 8x8",            r"`env.kwargs` must be names .*like {map_name: 8x8, .*\. Received: '8x8'"),
    ("cartpole --env CartPole-v1",           r"no option `--env`\. Did you mean `--env.id`"),
    ("cartpole --lr 0.1",                    r"no option `--lr`\. Did you mean `--learner.learning-rate`"),
    ("cartpole --num-envs 2",                r"Did you mean `--env.envs-per-rank`"),
    ("cartpole --learner.batch_sise 3",      r"Did you mean `--learner.batch-size`"),
    ("cartpole --agnet.gamma 1",             r"Did you mean `--agent.gamma`"),
    ("cartpole --learner.replay-ratio 8",    r"Its name is now `--learner.samples-per-insert`"),
    ("cartpole --rundir x",                  r"Did you mean `--run-dir`"),
    ("cartpole -np 2",                       r"`-np` is an option of the launcher.*horovodrun -np 2 hvd-dqn train"),
    ("-np 2 cartpole",                       r"`-np` is an option of the launcher"),
    ("cartpole --seed",                      r"`--seed` needs a value: a whole number, at least 0"),
    ("cartpole --run-dir --resume",          r"`--run-dir` needs a value: a path"),
    ("cartpole --run-dir ''",                r"`--run-dir` needs a value"),
    ("cartpole --resume=true",               r"`--resume` takes no value\. Received: 'true'"),
    ("cartpole --resume",                    r"--resume needs --run-dir"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "line"), REFUSED)
def test_what_is_not_clear_is_refused_in_one_line(words, line):
    with pytest.raises(InputError, match=line) as error:
        read_settings(shlex.split(words))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("id", "name"), [("CartPole-v1", "CartPole-v1"), ("module:Mine-v0", "Mine-v0"), ("ALE/Pong-v5", "ALE-Pong-v5")]
)
def test_an_environment_alone_is_trained_with_the_defaults_in_a_run_of_its_name(id, name):
    _, called, config = read_settings(["--env.id", id])
    assert called == name
    assert config.env.id == id
    assert config.learner == Config().learner


def test_a_run_of_before_a_name_changed_says_which_to_write(tmp_path):
    run = Run(tmp_path)
    run.create(Config(), {"preset": "cartpole"})
    text = (tmp_path / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(text.replace("samples_per_insert", "replay_ratio"))
    with pytest.raises(
        InputError, match=r"config.yaml: .*`learner.replay_ratio`\. Its name is now `learner.samples_per_"
    ):
        read_settings(["--run-dir", str(tmp_path), "--resume"])


def test_other_commands_read_their_options_in_the_same_way():
    options = parse(EvaluateOptions, ["--episodes", "1e2", "runs/a", "--json"], "hvd-dqn evaluate")
    assert (options.episodes, str(options.run_dir), options.as_json, options.best) == (100, "runs/a", True, False)
    options = parse(PlotOptions, ["a", "b", "-o", "c d.png"], "hvd-dqn plot")
    assert ([str(run) for run in options.run_dirs], str(options.output)) == (["a", "b"], "c d.png")
    for words, line in [
        (["a", "b"], "no option `b`"),
        (["--epsilon", "2", "a"], "`--epsilon` must be a number from 0 to 1. Received: 2"),
        (["a", "--episode", "2"], "Did you mean `--episodes`"),
        (["a", "-np", "2"], "horovodrun -np 2 hvd-dqn evaluate"),
        ([], "`RUN_DIR` is missing"),
    ]:
        with pytest.raises(InputError, match=line):
            parse(EvaluateOptions, words, "hvd-dqn evaluate")
