#!/usr/bin/env bash
# Starts what a container is asked for: hvd-dqn when it is one of its commands or an option, else the program named.
set -euo pipefail

case ${1:-} in
    train | evaluate | plot | bench | doctor | presets | -*) set -- hvd-dqn "$@" ;;
esac
set -x
exec "$@" # so that a signal reaches the program, not this shell
