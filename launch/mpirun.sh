#!/usr/bin/env bash
# Starts N ranks of `hvd-dqn COMMAND...` with Open MPI's mpirun, on this machine or on several:
#   ./launch/mpirun.sh [options] COMMAND...        for example: ./launch/mpirun.sh -np 2 train cartpole
#     -np N              ranks; by default one per slot, or 2 without hosts
#     -H a:2,b:2         hosts and their slots; by default this machine
#     --hostfile FILE    the same as lines `a slots=2`
#     --interface NAME   the network between the hosts, for example eth0
#     -p PORT  -i KEY    ssh's port and private key
#     --extra 'WORDS'    more options of mpirun, split at blanks
#     --dry-run          prints the command and starts nothing
#     --verbose          shows the whole command that it starts
# It takes the hvd-dqn of HVD_DQN_BIN, else of the active environment, else of the clone's .venv. The hosts share that
# environment, this folder and the working directory. See ranks.sh for the variables of the ranks and their reasons.
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=ranks.sh
source "$(dirname "${BASH_SOURCE[0]}")/ranks.sh"

read_options "$@"
set_environment
find_mpi
[ -n "$mpi_is_open" ] || stop "$mpi is not Open MPI, whose options these are: use horovodrun.sh, which knows others."
options=(-np "$ranks" -H "$hosts" ${prefix[@]+"${prefix[@]}"})
options+=(--bind-to none --map-by slot) # a rank has several threads: bound to one core they would share it
options+=(-mca pml ob1 -mca btl ^openib) # Horovod's own choice: TCP and shared memory, which stand several threads
[ "$(id -u)" != 0 ] || options+=(--allow-run-as-root) # containers; Open MPI otherwise refuses
# Ranks on other hosts get only the named variables; Open MPI itself passes OMPI_MCA_... on.
for name in $(compgen -e | LC_ALL=C sort); do
    [[ ! $name =~ $travels ]] || options+=(-x "$name")
done
# Pass it on only if it hides all GPUs: numbers, which batch systems set, are valid on one host.
[[ ! ${CUDA_VISIBLE_DEVICES-none said} =~ ^(-1)?$ ]] || options+=(-x CUDA_VISIBLE_DEVICES)
start mpirun "${options[@]}" ${extra[@]+"${extra[@]}"} hvd-dqn "${words[@]}"
