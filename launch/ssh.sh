#!/usr/bin/env bash
# The ssh through which mpirun starts its daemon on another host and holds it: ssh.sh [options of ssh...] HOST COMMAND
# It notices within half a minute that the host is gone, reports that, and makes mpirun end. Otherwise Open MPI would wait
# for the answer of a daemon that it can no longer reach, even after its ranks have aborted.
set -euo pipefail

launcher=$PPID # mpirun, or on large clusters the daemon that starts this one
host=${*: -2:1}
code=0
# A host is gone when it has answered nothing for 25 s: TCP alone would try for a quarter of an hour.
ssh -o ServerAliveInterval=5 -o ServerAliveCountMax=4 "$@" || code=$?

is_there() { [[ $(cat "/proc/$launcher/comm" 2>/dev/null) =~ ^(mpirun|orterun|orted)$ ]]; }
# 255 is a failure of ssh, others are the daemon's. An immediate one is a failure to connect, which mpirun reports itself.
if [ "$code" = 255 ] && [ "$SECONDS" -ge 20 ] && is_there; then
    echo "ssh.sh: $host has answered nothing for 25 s: it or the link to it is down. This ends the job." >&2
    sleep 15 # where its ranks have not aborted yet, mpirun ends by itself and gives them ten seconds for that
    if is_there; then
        kill -s KILL "$launcher" # asked by SIGTERM, Open MPI 4.1 ends in a segmentation fault
        rm -rf "${TMPDIR:-/tmp}/ompi.$(hostname).$UID/pid.$launcher" # what it would have cleared away
    fi
fi
exit "$code"
