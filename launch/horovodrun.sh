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
#     --verbose          shows the whole command that it starts
# It takes the hvd-dqn of HVD_DQN_BIN, else of the active environment, else of the clone's .venv. The hosts share that
# environment, this folder and the working directory. See ranks.sh for the variables of the ranks and their reasons.
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=ranks.sh
source "$(dirname "${BASH_SOURCE[0]}")/ranks.sh"

# horovodrun writes the names of all variables in a line for a shell, and under Gloo their values too. This leaves out
# names that no shell knows and, where Gloo's line would become too long, the largest values of variables of others.
fit_environment() {
    local LC_ALL=C name value bytes room=90000 # bytes: a line holds 128 KiB, and quoting takes some of it
    local -a odd=() large=()
    local -A size=()
    while IFS= read -rd '' name; do
        if [[ ! $name =~ ^([A-Za-z_][A-Za-z0-9_]*|BASH_FUNC_.*)$ ]]; then
            odd+=("$name")
        elif [[ -n $gloo && $name != BASH_FUNC_* ]]; then
            value=${!name}
            bytes=$((${#name} + ${#value} + 2)) room=$((room - bytes))
            [[ $name =~ $travels|^HOME$ ]] || size[$name]=$bytes
        fi
    done < <(env -0 | cut -zd= -f1)
    while ((room < 0)) && ((${#size[@]} > 0)); do
        name=$(for name in "${!size[@]}"; do echo "${size[$name]} $name"; done | sort -rn | head -n 1)
        large+=("${name#* }") room=$((room + ${name% *}))
        unset "size[${name#* }]"
    done
    ((room >= 0)) || stop "the variables that ranks need have $((-room)) bytes more than Gloo's command line holds: shorten them, or leave --gloo out."
    [ ${#large[@]} = 0 ] || echo "$me: the ranks do not get ${large[*]}: Gloo's command line has no room for so much." >&2
    for name in ${odd[@]+"${odd[@]}"} ${large[@]+"${large[@]}"}; do without+=(-u "$name"); done
}

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
home=~ # where it keeps notes about hosts
[ -w "$home" ] || options+=(--disable-cache)
fit_environment
start horovodrun "${options[@]}" ${extra[@]+"${extra[@]}"} ${end[@]+"${end[@]}"} hvd-dqn "${words[@]}"
