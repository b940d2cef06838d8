"""The console script."""

import os
import sys

from hvd_dqn.placement import set_thread_defaults


def main() -> None:
    """Runs one command. Exit codes: 0 done, 1 failed, 2 bad input, 75 stopped on request after a checkpoint."""
    set_thread_defaults()

    from hvd_dqn.commands import run_command  # and with it NumPy, whose number of threads is now settled

    # A console script does not have it: for the user's own `module:EnvId` and `module:function`.
    sys.path.insert(0, os.getcwd())
    run_command()
