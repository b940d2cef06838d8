#!/usr/bin/env bash
# Trains PRESET on N ranks (2 unless said), after making .venv if that is still to do:
#   ./launch/train.sh [-np N] PRESET [settings of `hvd-dqn train`...]
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
usage="usage: $0 [-np N] PRESET [settings of \`hvd-dqn train\`...]    for example: $0 -np 2 cartpole"

ranks=2
while [ "${1:-}" = -np ]; do
    ranks=${2:-}
    shift $(($# < 2 ? $# : 2))
done
[[ $# -gt 0 && $ranks =~ ^[1-9][0-9]*$ ]] || { echo "$usage" >&2; exit 2; }
[[ $1 != -h && $1 != --help ]] || { echo "$usage"; exit 0; }

"$root/launch/setup.sh"

export PATH=$root/.venv/bin:$PATH
export TF_CPP_MIN_LOG_LEVEL=${TF_CPP_MIN_LOG_LEVEL:-2}
# Ranks that wait otherwise spin and take the core from those that work.
export OMPI_MCA_mpi_yield_when_idle=${OMPI_MCA_mpi_yield_when_idle:-1}
# On Ctrl-C mpirun ends its ranks with SIGTERM, and after this many seconds with SIGKILL: its own 1 is too short for a checkpoint.
export OMPI_MCA_odls_base_sigkill_timeout=${OMPI_MCA_odls_base_sigkill_timeout:-5}
# A rank's output goes through pipes: tell rank 0 which terminal its progress display can be drawn on.
if [ -t 2 ]; then HVD_DQN_TTY=$(tty <&2) && export HVD_DQN_TTY; fi

# Only rank 0 prints, so drop Open MPI's [1,0]<stdout>: before every line, which horovodrun asks for.
untagged=()
if [[ $(mpirun --version) == *'Open MPI'* ]]; then untagged=(--mpi-args='-mca orte_tag_output 0'); fi

set -x
exec horovodrun -np "$ranks" "${untagged[@]}" hvd-dqn train "$@"
