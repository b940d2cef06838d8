#!/usr/bin/env bash
# Starts N ranks of `hvd-dqn COMMAND...` with Open MPI's mpirun, on this machine or on several:
#   ./launch/mpirun.sh [options] COMMAND...        for example: ./launch/mpirun.sh -np 2 train cartpole
#     -np N              ranks; as many as there are slots unless said, without hosts 2
#     -H a:2,b:2         hosts and their slots; this machine unless said
#     --hostfile FILE    the same as lines `a slots=2`
#     --interface NAME   the network between the hosts, for example eth0
#     -p PORT  -i KEY    ssh's port and private key
#     --extra 'WORDS'    more options of mpirun, split at blanks
#     --dry-run          prints the command and starts nothing
# The hosts share this folder and the working directory. What is set for the ranks, and why, stands in ranks.sh.
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
# Ranks on other hosts get nothing but what is named; OMPI_MCA_... goes by itself.
travels='^(PATH|LD_LIBRARY_PATH|PYTHONPATH|(HVD_DQN|HOROVOD|NCCL|TF|OMP|XLA|MALLOC)_.*)$'
for name in $(compgen -e | LC_ALL=C sort); do
    [[ ! $name =~ $travels ]] || options+=(-x "$name")
done
# Whoever hides all GPUs does so everywhere; numbers, which batch systems set, are one host's own.
[[ ! ${CUDA_VISIBLE_DEVICES-none said} =~ ^(-1)?$ ]] || options+=(-x CUDA_VISIBLE_DEVICES)
start mpirun "${options[@]}" ${extra[@]+"${extra[@]}"} hvd-dqn "${words[@]}"
