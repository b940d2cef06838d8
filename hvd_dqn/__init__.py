"""Deep Q-Networks trained by many processes and GPUs together, with Horovod."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hvd_dqn.agent.policy import Policy
    from hvd_dqn.api import evaluate, load_policy, train
    from hvd_dqn.config import Config
    from hvd_dqn.job import Evaluation, Result

__version__ = "0.1.0"
__all__ = ["Config", "Evaluation", "Policy", "Result", "__version__", "evaluate", "load_policy", "train"]

_HOMES = dict.fromkeys(("evaluate", "load_policy", "train"), "hvd_dqn.api")
_HOMES |= {"Config": "hvd_dqn.config", "Policy": "hvd_dqn.agent.policy"}
_HOMES |= dict.fromkeys(("Evaluation", "Result"), "hvd_dqn.job")

_MODULES = ("errors", "training")
_HOMES |= {name: f"hvd_dqn.{name}" for name in _MODULES}


def __getattr__(name: str) -> Any:
    """Imports on first use: TensorFlow takes seconds, and NumPy's number of threads must be set before its import."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from hvd_dqn.loading import load_tensorflow
    from hvd_dqn.ranks.placement import thread_defaults

    with thread_defaults():
        if _HOMES[name] in ("hvd_dqn.api", "hvd_dqn.job"):
            load_tensorflow()
        module = importlib.import_module(_HOMES[name])
    globals()[name] = value = module if name in _MODULES else getattr(module, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
