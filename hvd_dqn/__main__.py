"""`python -m hvd_dqn` is `hvd-dqn`."""

from hvd_dqn.cli import main

main()
