"""The same update written for JAX: K updates in one compiled `lax.scan`, about what one process can reach.

Network, Adam, Huber loss, clipping and target copy are those of `hvd-dqn bench learner`, the minibatches come as stacked NumPy
arrays as ours do, and "with sampling" draws them from our own replay. The target's values are formed inside the scan and, in a
second form, before it for all K minibatches at once (ours does that where it pays); the faster one counts.
"""

import os
from collections.abc import Callable
from functools import partial
from typing import Any

# XLA takes as many threads as the process may use cores: with one core it is one.
os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import shared  # noqa: E402

from hvd_dqn.agent.replay import Replay  # noqa: E402 - the package itself is on PYTHONPATH, without TensorFlow
from hvd_dqn.agent.transition import Transition  # noqa: E402

CONVOLUTIONS = [(8, 4, 32), (4, 2, 64), (3, 1, 64)]  # size, stride, filters (Mnih et al. 2015)
RATE, CLIP, BETA1, BETA2, EPSILON = 1e-4, 10.0, 0.9, 0.999, 1e-7


def parameters(case: dict[str, Any]) -> list[tuple[jax.Array, jax.Array]]:
    rng, shapes, inputs = np.random.default_rng(0), [], int(np.prod(case["observation"]))
    if case["network"] == "cnn":
        channels, side = case["observation"][2], case["observation"][0]
        for size, stride, filters in CONVOLUTIONS:
            shapes.append((size, size, channels, filters))
            channels, side = filters, (side - size) // stride + 1
        inputs = side * side * channels
    for outputs in (*case["hidden"], case["actions"]):
        shapes.append((inputs, outputs))
        inputs = outputs
    bounds = [1 / np.sqrt(np.prod(shape[:-1])) for shape in shapes]
    return [
        tuple(jnp.asarray(rng.uniform(-bound, bound, part), jnp.float32) for part in (shape, shape[-1:]))
        for shape, bound in zip(shapes, bounds, strict=True)
    ]


def values(weights: list[tuple[jax.Array, jax.Array]], x: jax.Array) -> jax.Array:
    """[B, A] from observations [B, ...]."""
    if x.ndim == 4:
        x = x.astype(jnp.float32) / 255.0
        for (kernel, bias), (_, stride, _) in zip(weights, CONVOLUTIONS, strict=False):
            x = jax.lax.conv_general_dilated(
                x, kernel, (stride, stride), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            x = jax.nn.relu(x + bias)
        x, weights = x.reshape(len(x), -1), weights[len(CONVOLUTIONS) :]
    for kernel, bias in weights[:-1]:
        x = jax.nn.relu(x @ kernel + bias)
    return x @ weights[-1][0] + weights[-1][1]


def loss(weights: Any, observation: jax.Array, action: jax.Array, target: jax.Array) -> jax.Array:
    q = values(weights, observation)
    error = jnp.abs((q * jax.nn.one_hot(action, q.shape[-1])).sum(-1) - target)
    return jnp.where(error <= 1.0, 0.5 * error**2, error - 0.5).mean()


@partial(jax.jit, static_argnames="ahead", donate_argnums=0)
def phase(state: tuple, batch: Any, ahead: bool) -> tuple[tuple, jax.Array]:
    """K updates from a batch [K, B, ...], and a copy into the target network."""
    weights, target, moment, velocity, count = state
    q_next = None
    if ahead:
        following = batch.next_observation
        q_next = values(target, following.reshape(-1, *following.shape[2:])).reshape(*following.shape[:2], -1)

    def update(carry: tuple, inputs: tuple) -> tuple[tuple, jax.Array]:
        weights, moment, velocity, count = carry
        minibatch, ready = inputs
        best = (values(target, minibatch.next_observation) if ready is None else ready).max(-1)
        goal = jax.lax.stop_gradient(minibatch.reward + minibatch.discount * best)
        cost, gradient = jax.value_and_grad(loss)(weights, minibatch.observation, minibatch.action, goal)
        norm = jnp.sqrt(sum((g**2).sum() for g in jax.tree.leaves(gradient)))
        gradient = jax.tree.map(lambda g: g * (CLIP / jnp.maximum(norm, CLIP)), gradient)
        count = count + 1
        moment = jax.tree.map(lambda m, g: BETA1 * m + (1 - BETA1) * g, moment, gradient)
        velocity = jax.tree.map(lambda v, g: BETA2 * v + (1 - BETA2) * g**2, velocity, gradient)
        rate = RATE * jnp.sqrt(1 - BETA2**count) / (1 - BETA1**count)
        weights = jax.tree.map(lambda w, m, v: w - rate * m / (jnp.sqrt(v) + EPSILON), weights, moment, velocity)
        return (weights, moment, velocity, count), cost

    (weights, moment, velocity, count), costs = jax.lax.scan(
        update, (weights, moment, velocity, count), (batch, q_next)
    )
    # Not the same buffer: the next phase gives both away.
    return (weights, jax.tree.map(jnp.copy, weights), moment, velocity, count), costs.sum()


def filled(case: dict[str, Any]) -> Replay:
    shape = tuple(case["observation"])
    frame, stack = ((*shape[:-1], 1), shape[-1]) if len(shape) == 3 else (shape, 1)
    dtype = np.uint8 if len(shape) == 3 else np.float32
    replay = Replay(case["transitions"], 1, frame, dtype, np.random.default_rng(0), frame_stack=stack)
    no, yes = np.zeros(1, bool), np.ones(1, bool)

    def write(observation: Any, action: int, reward: float, terminated: bool, following: Any) -> None:
        ends = np.array([terminated])
        rewards = np.array([reward], np.float32)
        replay.add(Transition(observation[None], np.array([action]), rewards, ends, no, following[None], yes))

    shared.transitions({**case, "observation": frame}, write)
    return replay


def jobs(case: dict[str, Any]) -> dict[str, tuple[Callable[[], None], int]]:
    replay = filled(case)
    phases = max(1, case["phases"] // 4) if case["network"] == "cnn" else case["phases"]  # XLA convolves slowly on CPUs
    batch = replay.gather(replay.draw(case["updates"], case["batch"]))

    def job(ahead: bool, sampled: bool) -> tuple[Callable[[], None], int]:
        weights = parameters(case)
        zeros = partial(jax.tree.map, jnp.zeros_like, weights)
        state = (weights, jax.tree.map(jnp.copy, weights), zeros(), zeros(), jnp.zeros(()))

        def train() -> None:
            nonlocal state
            for _ in range(phases):
                drawn = replay.gather(replay.draw(case["updates"], case["batch"])) if sampled else batch
                state, cost = phase(state, drawn, ahead)
                float(cost)  # waits for the phase, as our metrics do

        train()  # compiles
        return train, phases * case["updates"]

    forms = {"inside": False, "ahead": True}
    return {
        f"{form}{', sampled' * sampled}": job(ahead, sampled)
        for form, ahead in forms.items()
        for sampled in (False, True)
    }


def learner() -> None:
    asked = shared.request()
    all_jobs = {f"{name}: {form}": job for name, case in asked["cases"].items() for form, job in jobs(case).items()}
    times = shared.in_turns(all_jobs, asked["repeats"])
    forms = {
        name: {form: times[f"{name}: {form}"] for form in ("inside", "ahead", "inside, sampled", "ahead, sampled")}
        for name in asked["cases"]
    }
    shared.reply(
        versions=shared.versions("jax"),
        forms=forms,
        microseconds={name: min(t["inside"], t["ahead"]) for name, t in forms.items()},
        microseconds_with_sampling={name: min(t["inside, sampled"], t["ahead, sampled"]) for name, t in forms.items()},
    )


if __name__ == "__main__":
    learner()
