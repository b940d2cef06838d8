"""Deep Q-Networks trained by many processes and GPUs together, with Horovod."""

__version__ = "0.1.0"
