"""A world whose ranks may be lost and may join while the job runs: Horovod's elastic Gloo, without its decorator.

`horovod.elastic.run` is not used: it recognises a lost rank by the names of three operations. The grouped all-reduce of
every update is not among them, so its error would end the training.
"""

import os
from typing import Any, TypeVar

from hvd_dqn.errors import RanksChanged
from hvd_dqn.ranks.world import HorovodWorld

T = TypeVar("T")
# All ranks wait this long for a joining rank to start; if it takes longer, the job ends. Horovod's default is 30.
JOIN_SECONDS = "120"


class ElasticWorld(HorovodWorld):
    """Successive generations of ranks. `regroup` begins the next one."""

    elastic = True

    def __init__(self) -> None:
        os.environ.setdefault("HOROVOD_GLOO_TIMEOUT_SECONDS", JOIN_SECONDS)
        super().__init__()
        from horovod.common.elastic import notification_manager

        notification_manager.init()
        notification_manager.register_listener(self)

    def on_hosts_updated(self, timestamp: Any, result: Any) -> None:
        """Called by Horovod, in a thread of its own and on the chief alone."""
        self.changed = True

    def recovers_from(self, error: Exception) -> bool:
        """Whether the error is the loss of other ranks, and this job continues without them."""
        import tensorflow as tf

        # Horovod: the message holds the name of its operation or, if we named that, the path of Horovod's source.
        return isinstance(error, RanksChanged) or (
            isinstance(error, tf.errors.UnknownError) and "horovod" in str(error).lower()
        )

    def regroup(self) -> None:
        """Waits for all ranks of the next generation. Networks, optimizer and graphs are kept."""
        # Reset before Horovod counts the ranks: a change after this point needs another regroup.
        self.changed = False
        self._hvd.shutdown()
        self._hvd.init()
        self._read_ranks()

    def furthest(self, held: T | None, total_steps: int) -> tuple[T | None, bool]:
        """What the rank with the most total steps has, and whether some ranks have nothing while others do.

        A collective, and the first one of every generation.
        """
        steps = self.gather(-1 if held is None else total_steps)
        if max(steps) < 0:
            return None, False
        holder = steps.index(max(steps))
        return self.gather(held if self.rank == holder else None)[holder], min(steps) < 0
