#!/usr/bin/env bash
# Trains PRESET on N ranks (by default 2); makes .venv first if necessary:
#   ./launch/train.sh [-np N] PRESET [settings of `hvd-dqn train`...]
# It calls setup.sh, then horovodrun.sh, which has more options, with the hvd-dqn of that .venv.
set -euo pipefail

launch=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
usage="usage: $0 [-np N] PRESET [settings of \`hvd-dqn train\`...]    for example: $0 -np 2 cartpole"

ranks=2
while [ "${1:-}" = -np ]; do
    ranks=${2:-}
    shift $(($# < 2 ? $# : 2))
done
[[ $# -gt 0 && $ranks =~ ^[1-9][0-9]*$ ]] || { echo "$usage" >&2; exit 2; }
[[ $1 != -h && $1 != --help ]] || { echo "$usage"; exit 0; }

[ ! -w "$launch" ] || "$launch/setup.sh" # in a clone of others', use the .venv that they made
HVD_DQN_BIN=${launch%/launch}/.venv/bin
export HVD_DQN_BIN
exec "$launch/horovodrun.sh" -np "$ranks" train "$@"
