"""One module per command of `hvd-dqn`."""
