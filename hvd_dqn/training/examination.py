"""Examines the environment of a run before it is trained: what the network will see, how fast it is, what is wrong."""

import contextlib
from collections.abc import Iterator
from time import perf_counter
from typing import Any

import numpy as np

from hvd_dqn.agent.replay import Replay
from hvd_dqn.config import Config
from hvd_dqn.envs.checker import findings, has_time_limit
from hvd_dqn.envs.environments import Environments
from hvd_dqn.envs.wrapping import described
from hvd_dqn.errors import InputError, RunError
from hvd_dqn.ranks.world import Solo
from hvd_dqn.training.build import make_environments, make_one, make_preprocess

STEPS = 400  # at random, for the range of observations and the returns
SECONDS = 1.0  # at most, for each speed


def examine_environment(config: Config) -> dict[str, Any]:
    """A report of JSON values. Raises InputError if the environment cannot be made, or its spaces cannot be learned."""
    env = config.env
    kwargs = dict(env.kwargs) | ({} if env.max_episode_steps is None else {"max_episode_steps": env.max_episode_steps})
    report: dict[str, Any] = {
        "id": env.id,
        "kwargs": env.kwargs,
        "wrappers": [described(wrapper) for wrapper in env.wrappers],
        "has_time_limit": env.max_episode_steps is not None or has_time_limit(env.id, kwargs),
        "problems": [],
    }
    problems = report["problems"]
    with contextlib.closing(make_one(config, Solo())) as one:
        report["spaces"] = {"observation": _line(one.observation_space), "action": _line(one.action_space)}
        with _told(problems):
            report["checker"] = findings(env.id, kwargs)
        with _told(problems):
            one.try_out()
            report["resumes_exactly"] = one.probe()
            one.reset([config.seed])
            report["action_mask"] = _mask(one)
            report |= _seen(config, one)
            problems += _doubts(report)
            report["steps_per_second"] = [{"copies": 1, "steps": _speed(one, config.seed)}]
        problems += one.warnings
    with _told(problems):
        copies = env.envs_per_rank
        if copies > 1 and "steps_per_second" in report:
            with contextlib.closing(make_environments(config, Solo(), copies, env.vectorization)) as many:
                problems += many.notes
                many.reset(list(range(copies)))
                report["steps_per_second"].append({"copies": copies, "steps": _speed(many, config.seed)})
        elif copies == 1:
            problems += one.notes
    report["problems"] = list(dict.fromkeys(problems))
    return report


@contextlib.contextmanager
def _told(problems: list[str]) -> Iterator[None]:
    """An environment that fails is a problem to tell, and the examination goes on with what needs no step."""
    try:
        yield
    except (InputError, RunError) as error:
        problems.append(str(error).splitlines()[0])
    except Exception as error:
        problems.append(f"{type(error).__name__}: {' '.join(str(error).split())}")


def _mask(envs: Environments) -> str | None:
    """In words; None if masks are not used."""
    if envs.mask is None:
        return None
    return f"{np.count_nonzero(envs.mask[0])} of {envs.mask[0].size} actions are allowed after a reset"


def _random_action(envs: Environments, rng: np.random.Generator) -> np.ndarray:
    return envs.choices.random(rng, envs.copies, envs.mask)


def _seen(config: Config, envs: Environments) -> dict[str, Any]:
    """What the network and the replay get, in random steps."""
    preprocess, frames = make_preprocess(config, envs), envs.frames
    rng = np.random.default_rng(config.seed)
    low, high, returns, lengths, rewards = np.inf, -np.inf, list[float](), list[int](), set[float]()
    for _ in range(STEPS):
        inputs = preprocess.array(envs.observation)
        low, high = min(low, float(inputs.min())), max(high, float(inputs.max()))
        transition, episodes = envs.step(_random_action(envs, rng))
        rewards.add(float(transition.reward[0]))
        returns += episodes.returns.tolist()
        lengths += episodes.lengths.tolist()
    size = 1_000  # slots, so that what a ring needs once vanishes
    mask_width = envs.actions if envs.masked else 0
    needed = Replay.memory_needed(size, 1, frames.shape, frames.dtype, envs.choices.shape, mask_width)
    return {
        "network": {
            "shape": list(preprocess.input_shape),
            "dtype": "float32",
            "low": low,
            "high": high,
            "actions": envs.actions,
            "choices": str(envs.action_map),
        },
        "replay": {
            "shape": list(frames.shape),
            "dtype": str(frames.dtype),
            "bytes_per_transition": round(needed / size),
        },
        "random_play": {
            "steps": STEPS,
            "episodes": len(returns),
            "return_mean": float(np.mean(returns)) if returns else None,
            "length_mean": float(np.mean(lengths)) if lengths else None,
            "rewards": len(rewards),
        },
    }


def _doubts(report: dict[str, Any]) -> list[str]:
    """What is allowed, and is seldom meant."""
    network, play, doubts = report["network"], report["random_play"], []
    if network["low"] == network["high"]:
        doubts.append(f"Every number that was observed is {network['low']:g}: nothing can be learned from that.")
    if max(abs(network["low"]), abs(network["high"])) > 100:
        doubts.append(
            f"The network would see numbers from {network['low']:.4g} to {network['high']:.4g}: "
            "--env.normalize-observation true brings them to about 1."
        )
    if not play["episodes"] and not report["has_time_limit"]:
        doubts.append(
            f"No episode ended in {play['steps']} random steps, and it has no time limit. Give it one: --env.max-episode-steps."
        )
    return doubts


def _speed(envs: Environments, seed: int) -> float:
    """Steps per second over all copies, with random actions."""
    rng = np.random.default_rng(seed)
    envs.step(_random_action(envs, rng))
    began, steps = perf_counter(), 0
    while (passed := perf_counter() - began) < SECONDS:
        envs.step(_random_action(envs, rng))
        steps += 1
    return steps * envs.copies / passed


def _line(space: Any) -> str:
    return " ".join(str(space).split())
