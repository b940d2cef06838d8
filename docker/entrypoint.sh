#!/usr/bin/env bash
# Starts what a container is asked for: hvd-dqn when it is one of its commands or an option, else the program named.
set -euo pipefail

case ${1:-} in
    train | evaluate | plot | bench | doctor | presets | -*) set -- hvd-dqn "$@" ;;
    # tini gives the stop signal to all that runs. horovodrun's own shell would die of it, and the container with it, before
    # mpirun has passed it on and the ranks have saved; mpirun and the ranks do not heed what they inherit here.
    horovodrun) trap '' USR1 ;;
esac
set -x
exec "$@" # so that a signal reaches the program, not this shell
