#!/usr/bin/env bash
# The ssh through which mpirun starts its daemon on another host and holds it: ssh.sh [options of ssh...] HOST COMMAND...
# It notices within half a minute that the host is gone, and then sees to it that mpirun ends: once its ranks have aborted,
# Open MPI waits without end for the answer of a daemon that it can no longer reach.
set -euo pipefail

launcher=$PPID # mpirun, or on large clusters the daemon that starts this one
code=0
# A host that leaves six questions in a row, 5 s apart, without an answer is gone: TCP alone would try for a quarter of an hour.
ssh -o ServerAliveInterval=5 -o ServerAliveCountMax=6 "$@" || code=$?

is_there() { [[ $(ps -o comm= -p "$launcher") =~ ^(mpirun|orterun|orted)$ ]]; }
end_launcher() {
    sleep 5 # it ends by itself where its ranks have not aborted yet
    is_there || return 0
    echo "ssh.sh: the link to a host of this job is lost, and mpirun waits for it: ending mpirun." >&2
    kill -s KILL "$launcher" # asked by SIGTERM, Open MPI 4.1 ends in a segmentation fault
    rm -rf "${TMPDIR:-/tmp}/ompi.$(hostname).$UID/pid.$launcher" # what it would have cleared away
}
# 255 is ssh's own failure, all others are the daemon's.
if [ "$code" = 255 ]; then end_launcher & fi
exit "$code"
