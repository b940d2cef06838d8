#!/usr/bin/env bash
# Shared by the batch scripts of slurm/, pbs/ and lsf/; do not run it by itself. A script that sources it has set `script`
# (its name), `root` (the project's folder), `job` (the job's name and id) and `submit` (the command that submits it).
# The job runs in the folder from which it was submitted.
# shellcheck disable=SC2154 # set by the scripts
set -euo pipefail

words=() to_train='' part='' run_dir='' began_at='' code='' was_ended=''

root=$(cd "$root" && pwd)
stop() { echo "$script: $*" >&2; exit 2; }
# shellcheck source-path=SCRIPTDIR source=environment.sh
source "$root/launch/environment.sh"

# prepare WORDS...: goes to where the job was submitted. Sets `words` to the arguments of `hvd-dqn train`, and `run_dir`.
prepare() {
    local word more place=${PBS_O_WORKDIR:-${LS_SUBCWD:-$PWD}}
    # Slurm starts a job there or in --chdir, but in /tmp where a node has neither.
    [ "$PWD" != /tmp ] || [ -d "${SLURM_SUBMIT_DIR:-/tmp}" ] || place=$SLURM_SUBMIT_DIR
    cd "$place" 2>/dev/null || stop "$(hostname) has no folder $place, from which this job was submitted: nodes must share it."
    [ "$PWD" = "$root" ] || submit=${submit/launch\//$root/launch/}
    read -rd '' -a more <<<"${HVD_DQN_ARGS:-}" || true # at blanks and at ends of lines
    for word in "$@" ${more[@]+"${more[@]}"}; do
        case $word in
            --) ;;
            --run-dir* | --run_dir* | --resume)
                stop "$word is set by this script: set HVD_DQN_RUN_DIR, and the job continues an existing run in it." ;;
            *) words+=("$word") ;;
        esac
    done
    to_train=${words[*]}
    [ -n "$to_train" ] || stop "expected what to train, for example: HVD_DQN_ARGS=cartpole $submit"
    run_dir=${HVD_DQN_RUN_DIR:-runs/${job//\//-}}$part # a job that is requeued keeps its id, and so finds its run
    began_at=$(newest)
    if [ -n "$began_at" ]; then
        echo "$script: continuing $run_dir from $began_at total steps" >&2
        words+=(--resume)
    elif [ -e "$run_dir/run.json" ] && [[ -z ${HVD_DQN_RUN_DIR:-} || ${SLURM_RESTART_COUNT:-0} != 0 ]]; then
        # A run of this job, whose host went down too early.
        mv "$run_dir" "$run_dir-without-checkpoint-$(date +%Y%m%d-%H%M%S)"
    fi
    words+=(--run-dir "$run_dir")
}

# The total steps of the newest resumable checkpoint.
newest() {
    local manifest steps last=''
    for manifest in "$run_dir"/checkpoints/*/MANIFEST.json; do
        grep -qs '"resumable": true' "$manifest" || continue
        steps=$(basename "$(dirname "$manifest")")
        ((10#$steps <= 10#${last:-0})) || last=$((10#$steps))
    done
    echo "$last"
}

# run COMMAND...: shows it and waits for its end, also after signals. Sets `code` to its exit code.
run() {
    local program signalled=1
    echo "+ $*" >&2
    "$@" &
    program=$!
    # srun and mpirun pass USR1 on to their ranks, which save and end. After TERM they would leave them little time.
    trap 'signalled=1; kill -USR1 "$program" 2>/dev/null || true' USR1
    trap 'signalled=1 was_ended=1; kill -USR1 "$program" 2>/dev/null || true' TERM INT
    while [ -n "$signalled" ]; do # a signal to this shell ends the wait, and not the program
        signalled=''
        wait "$program" && code=0 || code=$?
    done
    trap - USR1 TERM INT
}

# Options and their reasons are mpirun.sh's. HOSTS as a:2,b:2.
run_by_mpirun() { run "$root/launch/mpirun.sh" -H "$1" train "${words[@]}"; }

need_pmix() { [[ $(srun --mpi=list 2>&1) == *pmix* ]] || stop "srun has no pmix here (srun --mpi=list)$1."; }

# run_by_srun PROGRAM...: one rank for each task of a Slurm job.
run_by_srun() {
    local options=(--mpi=pmix) # the one way into MPI that Open MPI's packages know
    options+=(--export=ALL) # also where the job was submitted with less
    options+=(--kill-on-bad-exit=0) # the first rank that ends with 75 must not take the others: they end themselves
    options+=(--wait=120) # and none waits for ever for one that died before its watchdog lived
    # From Slurm 22.05 on srun does not take this from the job.
    [ -z "${SLURM_CPUS_PER_TASK:-}" ] || options+=(--cpus-per-task="$SLURM_CPUS_PER_TASK")
    run srun "${options[@]}" "$@" train "${words[@]}"
}

how_to_go_on() {
    local where=${run_dir%"$part"}
    [[ $where =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]] || where=$(printf %q "$where")
    echo "To continue: HVD_DQN_RUN_DIR=$where HVD_DQN_ARGS='$to_train' $submit"
}

# Whether the job shall be started again: it saved because its time was nearly over, and it had made progress. Without
# progress it would restart for ever. So might a cancelled job, which Slurm allows to requeue.
goes_on() {
    [ "$code" != 138 ] || echo "$script: asked to stop (USR1) while it was still starting: give the job more time." >&2
    [ "$code" = 75 ] || return 1
    if [ -n "$was_ended" ]; then
        echo "$script: ended from outside. $(how_to_go_on)" >&2
    elif [ "$(newest)" = "$began_at" ]; then
        echo "$script: stopped before it made progress, and so would the next start: give the job more time." >&2
    else
        return 0
    fi
    return 1
}

# finish COMMAND...: ends the job. If it shall continue, COMMAND starts it again first.
finish() {
    if goes_on; then
        echo "+ $*" >&2
        "$@" || echo "$script: not started again. $(how_to_go_on)" >&2
    fi
    exit "$code"
}
