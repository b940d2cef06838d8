#!/usr/bin/env bash
# Shared by horovodrun.sh and mpirun.sh; do not run it by itself. Their options, the check of the hosts and the
# variables of the ranks, each with its reason, are here once, whatever starts the ranks.
# shellcheck disable=SC2034 # used by these scripts
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
me=$(basename "$0")
ranks='' port='' key='' interface='' extra=() gloo='' dry_run='' verbose='' hosts='' names=() settings=() mpi_is_open='' prefix=()
without=() # -u NAME of each variable that a launcher cannot pass on
# The variables that ranks on other hosts get.
travels='^(PATH|LD_LIBRARY_PATH|PYTHONPATH|(HVD_DQN|HOROVOD|NCCL|TF|OMP|XLA|MALLOC)_.*)$'

stop() { printf '%s: %s See %s --help.\n' "$me" "$*" "$0" >&2; exit 2; }

# Open MPI splits the agent's words at blanks: such a path must come from PATH, which other hosts' daemons do not have.
agent=$root/launch/ssh.sh
[[ $agent != *[[:space:]]* ]] || agent=ssh.sh:ssh

# shellcheck source-path=SCRIPTDIR source=environment.sh
source "$root/launch/environment.sh"

# The options of both scripts, then the words for hvd-dqn, which stay in `words`.
read_options() {
    local list='' file='' more entries entry name
    while [[ ${1:-} == -* ]]; do
        case $1 in
            -h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit 0 ;;
            --dry-run) dry_run=1; shift; continue ;;
            --verbose) verbose=1; shift; continue ;;
            --gloo) [ "$me" = horovodrun.sh ] || stop "--gloo is horovodrun.sh's: mpirun has no Gloo."
                gloo=1; shift; continue ;;
            -np | -H | --hostfile | -p | -i | --interface | --extra) ;;
            *) stop "unknown option $1: options come before the command of hvd-dqn, its settings after it." ;;
        esac
        [ -n "${2:-}" ] || stop "$1 needs a value."
        case $1 in
            -np) ranks=$2 ;;
            -H) list=$2 ;;
            --hostfile) file=$2 ;;
            -p) port=$2 ;;
            -i) key=$2 ;;
            --interface) interface=$2 ;;
            --extra) read -rd '' -a more <<<"$2" || true; extra+=("${more[@]}") ;;
        esac
        shift 2
    done
    words=("$@")
    [ $# -gt 0 ] || stop "expected what hvd-dqn shall do, for example: $0 -np 2 train cartpole."
    [[ $ranks =~ ^([1-9][0-9]{0,5})?$ ]] || stop "-np takes a number of ranks, not $ranks."
    [[ $port =~ ^[0-9]*$ ]] || stop "-p takes the number of ssh's port, not $port."
    [[ $key != *[[:space:]]* ]] || stop "-i takes ssh's private key by a path without blanks, at which Open MPI would split it."
    [ -z "$key" ] || [ -r "$key" ] || stop "-i takes ssh's private key; there is no readable file $key."
    [ -z "$file" ] || [ -z "$list" ] || stop "-H and --hostfile both name the hosts: give one."
    [ -z "$file" ] || [ -r "$file" ] || stop "--hostfile takes lines \`host slots=2\`; there is no readable file $file."
    if [ -n "$file" ]; then
        read_hostfile "$file"
    else
        list=${list:-localhost:${ranks:-2}}
        read -rd '' -a entries <<<"${list//,/ }" || true
        for entry in ${entries[@]+"${entries[@]}"}; do
            add_host "$entry" '' || stop "expected hosts as a:2,b:2, not $entry$refused."
        done
        [ ${#names[@]} -gt 0 ] || stop "expected hosts as a:2,b:2, not $list."
    fi
    for name in "${names[@]}"; do hosts+=${hosts:+,}$name:${slots[$name]}; done
    ranks=${ranks:-$total}
    ((ranks <= total)) || stop "$ranks ranks do not fit into the $total slots of $(some "$hosts"): lower -np or give more slots."
}

# Adds the host $1, `a` or `a:2`, with $2 slots if it has none. Fills `names`, `slots` and `total`; a host named twice
# has the slots of both. Fails where it is no host, with what to do instead in `refused`.
declare -A slots=()
total=0 refused=''
add_host() {
    local name=${1##*@}
    name=${name%:*}
    case $1 in
        *@*) refused=", since ssh's user belongs in ~/.ssh/config (Host $name, User ${1%@*})"; return 1 ;;
        *:*:* | *\[*) refused=", an IPv6 address, which Open MPI's and Horovod's lists of hosts have not: give the host's name"; return 1 ;;
    esac
    [[ $1 =~ ^([A-Za-z0-9_][A-Za-z0-9_.-]*)(:([1-9][0-9]{0,5}))?$ ]] || return 1
    [ -z "$2" ] || [ -z "${BASH_REMATCH[3]:-}" ] || return 1
    name=${BASH_REMATCH[1]}
    [ -n "${slots[$name]:-}" ] || names+=("$name")
    set -- "${BASH_REMATCH[3]:-${2:-1}}"
    slots[$name]=$((${slots[$name]:-0} + $1))
    total=$((total + $1))
}

shopt -s extglob # for *([[:space:]]), before it is read
# Lines `host slots=2` as mpirun writes them, `host:2`, or `host` once per slot as batch systems do; `#` begins a comment.
read_hostfile() {
    local line words word count most number=0
    while IFS= read -r line || [ -n "$line" ]; do
        number=$((number + 1)) count='' most=''
        line=${line#$'\xef\xbb\xbf'} # what Windows' editors begin a file with, and end a line with
        line=${line%%#*}
        line=${line//$'\r'/}
        read -ra words <<<"${line//*([[:space:]])=*([[:space:]])/=}"
        [ ${#words[@]} -gt 0 ] || continue
        refused=''
        for word in "${words[@]:1}"; do
            if [[ $word =~ ^slots=([1-9][0-9]{0,5})$ && -z $count ]]; then
                count=${BASH_REMATCH[1]}
            elif [[ $word =~ ^max[_-]slots=([1-9][0-9]{0,5})$ ]]; then
                most=${BASH_REMATCH[1]} # how far mpirun may overload the host, which it is not asked for here
            else
                count=0
                break
            fi
        done
        [ -z "$most" ] || ((${count:-0} > 0 && most >= count)) || count=0
        { [ "$count" != 0 ] && add_host "${words[0]}" "$count"; } \
            || stop "$1, line $number: expected \`host\`, \`host slots=2\` or \`host:2\`, not \`${words[*]}\`$refused."
    done <"$1"
    [ ${#names[@]} -gt 0 ] || stop "$1 names no host: expected lines \`host slots=2\`."
}

# The first three of a:2,b:2,... and how many more.
some() {
    local -a all
    IFS=, read -ra all <<<"$1"
    ((${#all[@]} <= 4)) || all=("${all[@]:0:3}" "$((${#all[@]} - 3)) more hosts")
    (IFS=,; echo "${all[*]}")
}

is_here() {
    local address
    [[ " localhost $(hostname) $(hostname -s) " != *" $1 "* ]] || return 0
    address=$(getent ahostsv4 "$1" | awk 'NR == 1 {print $1}') || return 1
    [[ $address == 127.* || (-n $address && " $(hostname -I 2>/dev/null) " == *" $address "*) ]]
}
is_far() { # whether any host is another one
    local name
    for name in "${names[@]}"; do is_here "$name" || return 0; done
    return 1
}

# An MPI in a folder of its own is not on the PATH that ssh gives a daemon on another host.
find_mpi() {
    mpi=$(command -v mpirun) || stop "there is no mpirun on PATH: run $root/launch/setup.sh, or load your MPI's module."
    [[ $(mpirun --version 2>&1) != *'Open MPI'* ]] || mpi_is_open=1
    [[ $mpi == /usr/bin/* || $mpi == /bin/* ]] || ! is_far || prefix=(--prefix "$(dirname "$(dirname "$mpi")")")
}

# Prints why ranks cannot be started on the host $1; nothing if they can.
examine() {
    local said sees
    local -a ssh=(ssh -o BatchMode=yes -o ConnectTimeout=10 ${port:+-p "$port"} ${key:+-i "$key"} "$1")
    if ! said=$("${ssh[@]}" true 2>&1 </dev/null); then
        said=$(tail -n 1 <<<"$said" | tr -d '\r')
        echo "$1 cannot be reached by ssh ($said); it must open without a password, port by -p, key by -i."
        return
    fi
    sees="test -x $(show "$program") && test -d $(show "$PWD")"
    if ! "${ssh[@]}" "$sees" 2>/dev/null </dev/null; then
        echo "$1 does not see $program and $PWD: all hosts must share these folders, under the same names."
    fi
}

check() {
    local name complaints
    check_program
    type -P "$1" >/dev/null || stop "there is no $1 on PATH, and it is not in the environment of $program: install Horovod there."
    # If another agent is set, hosts are reached in another way.
    [ "${OMPI_MCA_plm_rsh_agent:-$agent}" = "$agent" ] || return 0
    # In a batch job Open MPI starts its daemons through the batch system; ssh between its nodes is often closed.
    [[ $me != mpirun.sh || -z ${SLURM_JOB_ID:-}${PBS_JOBID:-}${LSB_JOBID:-} ]] || return 0
    complaints=$(for name in "${names[@]}"; do is_here "$name" || examine "$name" & done; wait)
    [ -z "$complaints" ] || stop "$(paste -sd' ' <<<"$complaints")"
}

# The environment variables of every rank; `keep` leaves a value that is set already.
setting() { export "$1=$2"; settings+=("$1=$2"); }
keep() { setting "$1" "${!1:-$2}"; }
set_environment() {
    local name dotted=''
    find_program
    [[ $program != *:* ]] || stop "PATH cannot hold $program, for the colon in it: give that folder another name."
    keep TF_CPP_MIN_LOG_LEVEL 2 # TensorFlow's start-up notes, once per rank, hide the lines that matter
    # A rank's output goes through pipes: tell rank 0 which terminal its progress display can be drawn on.
    if [ -t 2 ] && is_here "${names[0]}"; then setting HVD_DQN_TTY "$(tty <&2)"; fi
    [ -z "$interface" ] || setting NCCL_SOCKET_IFNAME "$interface"
    [ -z "$gloo" ] || return 0
    keep OMPI_MCA_mpi_yield_when_idle 1 # ranks that wait otherwise spin, and take the core from those that work
    # On Ctrl-C mpirun sends its ranks SIGTERM, and SIGKILL this many seconds later. Its default of 1 is too short to save.
    keep OMPI_MCA_odls_base_sigkill_timeout 5
    if [ -n "$interface" ]; then # else Open MPI tries every network that it sees, those of containers included
        setting OMPI_MCA_btl_tcp_if_include "$interface" # between ranks
        setting OMPI_MCA_oob_tcp_if_include "$interface" # between mpirun and its daemons
    fi
    is_far || return 0
    for name in "${names[@]}"; do # otherwise Open MPI cuts a name at its first dot, and asks ssh for what is left of it
        [[ $name != *[!0-9.]* || $name != *.* ]] || dotted=1
    done
    [ -z "$dotted" ] || keep OMPI_MCA_orte_keep_fqdn_hostnames 1
    [ -z "$port$key" ] || setting OMPI_MCA_plm_rsh_args "${port:+-p $port}${port:+${key:+ }}${key:+-i $key}"
    # A lost host ends the job within a minute, with a message: mpirun asks its daemons from the tenth silent second on,
    # three times. While data waits to be sent over the lost link, TCP does not ask; then ssh.sh ends mpirun.
    keep OMPI_MCA_oob_tcp_keepalive_time 10
    keep OMPI_MCA_oob_tcp_keepalive_intvl 5
    keep OMPI_MCA_oob_tcp_keepalive_probes 3
    [[ $agent == */* ]] || export PATH=$PATH:$root/launch
    keep OMPI_MCA_plm_rsh_agent "$agent"
}

# Words as a shell would read them back, quoted only if necessary.
show() {
    local word line=''
    for word in "$@"; do
        [[ $word =~ ^[]A-Za-z0-9_@%+=:,./^[-]+$ ]] || word=$(printf %q "$word")
        line+=" $word"
    done
    printf '%s\n' "${line# }"
}

# Checks the hosts, shows the command in short (--verbose: as it is) and becomes it; a dry run only shows it.
start() {
    local line
    line="PATH=$(show "${program%/*}"):\$PATH $(show "${settings[@]}" ${without[@]+env "${without[@]}"} "$@")"
    if [ -n "$dry_run" ]; then echo "$line"; exit 0; fi
    check "$1"
    # What so many ranks cannot carry out is said in a second, before they start.
    [ "${words[0]}" != train ] || "$program" plan --check --ranks "$ranks" "${words[@]:1}" || exit
    [ -n "$verbose" ] || line="$1${gloo:+ --gloo} -np $ranks -H $(some "$hosts") ... $(show hvd-dqn "${words[@]}")   (from ${program%/*}; --verbose shows all)"
    echo "+ $line" >&2
    exec ${without[@]+env "${without[@]}"} "$@"
}
