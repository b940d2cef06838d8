"""How much memory a rank takes, said before it takes any: Linux grants more than there is, and kills the job hours later."""

import math
from typing import NamedTuple

from hvd_dqn.errors import InputError
from hvd_dqn.ranks.limits import Limit

PART_BYTES = 1 << 28  # of minibatches in memory at a time: a phase that needs more takes them in parts
WRITE_BUFFERS = 2 << 24  # NumPy writes an array in pieces of 16 MB, of which it has two copies
COPIES = 4  # of the weights, in a checkpoint: online and target network, and two moments of Adam


class Memory(NamedTuple):
    """Bytes that one rank needs at most, besides its libraries and environments."""

    replay: int
    minibatches: int  # of a phase, or of a part of it, with TensorFlow's copy
    checkpoint: int  # while it is written

    @property
    def total(self) -> int:
        return sum(self)


def bytes_per_update(transitions: int, observation_bytes: int, dimensions: int, mask_width: int) -> int:
    """Of an update's `transitions`: both observations, and what `Draw` and `Batch` hold besides."""
    # start, end, generation: 8 each; reward and discount: 4 each; the action's numbers: 8 each; the next mask.
    return transitions * (2 * observation_bytes + 3 * 8 + 2 * 4 + 8 * dimensions + mask_width)


def updates_per_part(updates: int, each: int) -> int:
    """Into how many updates a phase of `updates`, of `each` bytes, is divided, so that parts are about equal."""
    parts = min(updates, max(1, math.ceil(updates * each / PART_BYTES)))
    return math.ceil(updates / parts)


def memory_of_rank(replay: int, updates: int, each: int, parameters: int) -> Memory:
    """`updates` of `each` bytes are in memory together; the network has this many `parameters`."""
    return Memory(replay, 2 * updates * each, min(WRITE_BUFFERS, 2 * replay) + 4 * COPIES * parameters)


def check_memory(needed: Memory, ranks: int, available: Limit, received: str) -> None:
    """Raises InputError if `ranks` of a host, which need this much each, find less there."""
    if ranks * needed.total <= available.value:
        return
    way_out = "Lower --replay.capacity"
    if needed.minibatches > needed.replay:
        way_out = "Lower --learner.train_period, whose phases take all of it together under --learner.overlap"
    raise InputError(
        f"The job needs {ranks * needed.total / 1e9:.1f} GB on this machine, but {available.value / 1e9:.1f} GB are available "
        f"({available.source}). Needed: {ranks} rank{'s' * (ranks > 1)} x ({needed.replay / 1e9:.2f} GB of replay + "
        f"{needed.minibatches / 1e9:.2f} of minibatches + {needed.checkpoint / 1e9:.2f} to write a checkpoint). "
        f"Received: {received}. {way_out}, or start fewer ranks per machine."
    )
