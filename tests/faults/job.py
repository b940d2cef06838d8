"""`hvd-dqn`, broken on one rank: `python -m tests.faults.job FOLDER FAULT RANK train identity ...`

Leaves each rank's process id in FOLDER/rank-R, and says on stderr when the fault struck.
"""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import gymnasium
import numpy as np

from hvd_dqn import cli
from hvd_dqn.agent.replay import Replay
from hvd_dqn.envs.identity import Identity
from hvd_dqn.ranks.placement import LAUNCHER_VARIABLES
from hvd_dqn.storage.checkpoint import Checkpoints
from hvd_dqn.training.evaluation import Evaluator
from hvd_dqn.training.worker import Worker

STRIKES_AFTER = 1_000  # total steps: there is a checkpoint to go back to


class Fragile(gymnasium.Env):
    """Identity with observations of its own type, which breaks in its 200th step on the rank that is to fail."""

    fault = ""
    steps = 0

    def __init__(self) -> None:
        self._env = Identity()
        self.observation_space = gymnasium.spaces.Box(0.0, 3.0, (1,))
        self.action_space = self._env.action_space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        state, info = self._env.reset(seed=seed)
        return np.array([state], np.float32), info

    def step(self, action):
        state, reward, *ends = self._env.step(action)
        observation = np.array([state], np.float32)
        Fragile.steps += 1
        if Fragile.steps == 2_000:
            if Fragile.fault == "env raises":
                struck()
                raise OSError("the simulator lost its licence")
            if Fragile.fault == "NaN observation":
                struck()
                observation[:] = np.nan
            if Fragile.fault == "NaN reward":
                struck()
                reward = np.nan
        return observation, reward, *ends


gymnasium.register("Fragile-v0", Fragile)


def struck() -> None:
    print(f"\nstruck at {time.time():.3f}", file=sys.stderr, flush=True)


def later(action) -> None:
    """After the first phase of updates that begins after STRIKES_AFTER."""
    wait = Worker.finish_phase

    def broken(self):
        phase = wait(self)
        if phase and self.plan.total_steps_after(self.learned_at) > STRIKES_AFTER + self.plan.resumed_at:
            Worker.finish_phase = wait
            struck()
            action(self)
        return phase

    Worker.finish_phase = broken


def raising(where, name: str, calls: int) -> None:
    """The method raises in its `calls`-th call."""
    method, made = getattr(where, name), []

    def broken(self, *arguments, **options):
        made.append(None)
        if len(made) == calls:
            struck()
            raise ZeroDivisionError(f"broken on purpose in {name}")
        return method(self, *arguments, **options)

    setattr(where, name, broken)


def spoil_reward() -> None:
    gather, made = Replay.gather, []

    def broken(self, *arguments):
        batch = gather(self, *arguments)
        made.append(None)
        if len(made) == 40:
            struck()
            batch.reward[0, 0] = np.inf
        return batch

    Replay.gather = broken


def die(self) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail_in_thread(self) -> None:
    threading.Thread(target=lambda: 1 / 0).start()
    time.sleep(600)


def raise_here(self) -> None:
    raise ZeroDivisionError("broken on purpose in learning")


FAULTS = {
    "none": lambda: None,
    "killed": lambda: later(die),
    "frozen": lambda: later(lambda self: os.kill(os.getpid(), signal.SIGSTOP)),
    "hangs": lambda: later(lambda self: time.sleep(600)),
    "raises in learning": lambda: later(raise_here),
    "raises in a thread": lambda: later(fail_in_thread),
    "raises in evaluation": lambda: raising(Evaluator, "_play", 3),
    "raises in a checkpoint": lambda: raising(Checkpoints, "_write_part", 2),
    "env raises": lambda: setattr(Fragile, "fault", "env raises"),
    "NaN observation": lambda: setattr(Fragile, "fault", "NaN observation"),
    "NaN reward": lambda: setattr(Fragile, "fault", "NaN reward"),
    "infinite loss": spoil_reward,
}


def main() -> None:
    folder, fault, culprit, *words = sys.argv[1:]
    rank = next((int(os.environ[name]) for name in LAUNCHER_VARIABLES if name in os.environ), 0)
    (Path(folder) / f"rank-{rank}").write_text(str(os.getpid()))
    if rank == int(culprit):
        FAULTS[fault]()
    sys.argv = ["hvd-dqn", *words]
    cli.main()


if __name__ == "__main__":
    main()
