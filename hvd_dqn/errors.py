"""The two ways in which hvd_dqn refuses to go on, each printed as one line instead of a traceback."""


class InputError(ValueError):
    """What the user asked for cannot be done: exit code 2, before any rank trains."""


class RunError(RuntimeError):
    """The running job cannot go on, for a reason that lies outside this program: exit code 1."""
