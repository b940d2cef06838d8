"""The training loop: what every rank does in each cycle, and the objects it uses."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hvd_dqn.training.trainer import Record, Trainer

__all__ = ["Record", "Trainer"]


def __getattr__(name: str) -> Any:
    """Imports on first use, because TensorFlow takes seconds."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from hvd_dqn.training import trainer

    return getattr(trainer, name)
