#!/usr/bin/env bash
# Joins containers by ssh, with a key that is made at the first start in ~/.ssh, which all of them share:
#   cluster.sh worker                  waits for the key, then serves ssh on port 2222
#   cluster.sh head HOSTS COMMAND...   makes the key, waits for the hosts, starts launch/mpirun.sh COMMAND... on them
# HOSTS is a:2,b:2 (names and slots) or a file of lines `a slots=2`, such as Kubernetes' MPI Operator writes.
set -euo pipefail

keys=/home/hvd/.ssh
patience=${HVD_DQN_CLUSTER_SECONDS:-300} # how long to wait for the others
example="For example: head worker1,worker2 train cartpole"
stop() { echo "cluster.sh: $*" >&2; exit "${code:-1}"; }

# wait_for WHAT CURE COMMAND...: until the command succeeds.
wait_for() {
    local what=$1 cure=$2 until=$((SECONDS + patience))
    shift 2
    until "$@" 2>/dev/null; do
        ((SECONDS < until)) || stop "expected $what within $patience s, it did not come. $cure"
        sleep 1
    done
}

case ${1:-} in
    worker)
        wait_for "$keys/authorized_keys" "Start the head, and mount one volume as $keys in all containers." \
            test -s "$keys/authorized_keys"
        # Where all containers are stopped at once, the ranks here must first have saved; orted is what mpirun runs here.
        trap 'while pgrep -x orted >/dev/null; do sleep 0.2; done; exit 0' USR1
        set -x
        (trap '' USR1 && exec /usr/sbin/sshd -D -e -f /opt/hvd_dqn/docker/sshd_config) & # tini -g signals to it, too
        wait $!
        exit # with sshd's code
        ;;
    head) ;;
    *) code=2 stop "expected \`worker\` or \`head HOSTS COMMAND...\`, received \`$*\`. $example" ;;
esac
[ $# -ge 3 ] || code=2 stop "expected hosts and a command of hvd-dqn, received \`$*\`. $example"
hosts=$2
shift 2

if [ ! -s "$keys/authorized_keys" ]; then
    [ -w "$keys" ] || stop "expected that $(id -un) (uid $(id -u)) may write $keys, it may not: mount a new volume there."
    rm -f "$keys"/id_rsa*
    ssh-keygen -q -t rsa -b 3072 -N "" -C hvd_dqn -f "$keys/id_rsa"
    # The file that workers wait for comes last and whole.
    cp "$keys/id_rsa.pub" "$keys/authorized_keys.new"
    mv "$keys/authorized_keys.new" "$keys/authorized_keys"
fi

if [ -f "$hosts" ]; then
    where=(--hostfile "$hosts")
    names=$(sed -e 's/#.*//' "$hosts" | awk 'NF {print $1}')
else
    where=(-H "$hosts")
    names=$(tr , '\n' <<<"$hosts" | cut -d: -f1)
fi
for name in $names; do
    wait_for "an answer by ssh from $name" "Does it run \`cluster.sh worker\`, on this network, with the same $keys?" \
        ssh -o BatchMode=yes -o ConnectTimeout=5 "$name" true
done

set -x
exec /opt/hvd_dqn/launch/mpirun.sh "${where[@]}" "$@"
