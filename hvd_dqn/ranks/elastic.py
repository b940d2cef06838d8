"""Ranks that may be lost and that may join while the job goes on: Horovod's elastic Gloo, without its decorator.

`horovod.elastic.run` is not used: it knows a lost rank by the names of three operations, and takes the error of a grouped
all-reduce, which every update makes, for the end of the training.
"""

import os
from typing import Any, TypeVar

from hvd_dqn.errors import RanksChanged
from hvd_dqn.ranks.world import HorovodWorld

T = TypeVar("T")
# Until a rank that joins has started, all others wait for it; one that takes longer ends the job. Horovod's own is 30.
JOIN_SECONDS = "120"


class ElasticWorld(HorovodWorld):
    """The ranks of one generation after another. `regroup` begins the next."""

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
        import tensorflow as tf

        # Horovod: its operation is told by its name or, with a name of ours, by where in Horovod's source it was made.
        return isinstance(error, RanksChanged) or (
            isinstance(error, tf.errors.UnknownError) and "horovod" in str(error).lower()
        )

    def regroup(self) -> None:
        """Waits for all ranks of the next generation. Networks, optimizer and graphs stay as they are."""
        # Before Horovod asks who is there: what changes from here on is a reason to ask once more.
        self.changed = False
        self._hvd.shutdown()
        self._hvd.init()
        self._ask_places()

    def furthest(self, held: T | None, total_steps: int) -> tuple[T | None, bool]:
        """What the rank with the most total steps holds, and whether some rank holds nothing while another does.

        A collective, and the first of every generation: ranks that join do nothing with others before it.
        """
        steps = self.gather(-1 if held is None else total_steps)
        if max(steps) < 0:
            return None, False
        holder = steps.index(max(steps))
        return self.gather(held if self.rank == holder else None)[holder], min(steps) < 0
