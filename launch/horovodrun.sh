#!/usr/bin/env bash
# Starts N ranks of `hvd-dqn COMMAND...` with horovodrun, on this machine or on several:
#   ./launch/horovodrun.sh [options] COMMAND...        for example: ./launch/horovodrun.sh -np 2 train cartpole
#     -np N              ranks; by default one per slot, or 2 without hosts
#     -H a:2,b:2         hosts and their slots; by default this machine
#     --hostfile FILE    the same as lines `a slots=2`
#     --gloo             Gloo instead of MPI
#     --interface NAME   the network between the hosts, for example eth0
#     -p PORT  -i KEY    ssh's port and private key
#     --extra 'WORDS'    more options of horovodrun, split at blanks; OMPI_MCA_... variables reach its mpirun
#     --dry-run          prints the command and starts nothing
# The hosts share this folder and the working directory. See ranks.sh for the variables of the ranks and their reasons.
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=ranks.sh
source "$(dirname "${BASH_SOURCE[0]}")/ranks.sh"

read_options "$@"
set_environment
options=(-np "$ranks" -H "$hosts")
[ -z "$interface" ] || options+=(--network-interfaces "$interface")
[ -z "$port" ] || options+=(-p "$port")
[ -z "$key" ] || options+=(-i "$key")
if [ -n "$gloo" ]; then
    options+=(--gloo)
else
    find_mpi
    # Only rank 0 prints, so leave out the [1,0]<stdout>: that horovodrun adds to every line.
    [ -z "$mpi_is_open" ] || options+=(--mpi-args="-mca orte_tag_output 0${prefix[*]:+ ${prefix[*]}}")
fi
# It takes the beginning of an option of its own, such as hvd-dqn's --timeline, for that option; its Gloo launcher knows no `--`.
end=()
[ -n "$gloo" ] || end=(--)
start horovodrun "${options[@]}" ${extra[@]+"${extra[@]}"} ${end[@]+"${end[@]}"} hvd-dqn "${words[@]}"
