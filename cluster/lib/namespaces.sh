#!/bin/bash
# shellcheck disable=SC2154 # here, state and nodes are vcluster's
# Way B, the default, sourced by cluster/vcluster: every machine is a set of namespaces, all inside one box (lib/box.sh).
# What cluster/vcluster calls, here and in flat.sh: up, down, pid, run, kill and start, after the name of the way.

# Namespaces for the box; an ordinary user needs one for users around them.
box_namespaces() {
    [ "$(id -u)" = 0 ] || echo --user --map-current-user --keep-caps
    echo --net --uts --ipc --mount --pid --fork --kill-child=KILL --mount-proc
}

# Prints why this machine does not let us build nodes from namespaces; nothing if it does.
namespaces_refused() {
    local namespaces
    read -rd '' -a namespaces < <(box_namespaces)
    # shellcheck disable=SC2016
    unshare "${namespaces[@]}" sh -c 'mount -t tmpfs tmpfs /etc/slurm && ip link add probe type bridge &&
        ip link add left type veth peer name right && unshare --net --mount --pid --fork --mount-proc true' 2>&1 | head -n 1
}

start_box() (
    read -rd '' -a namespaces < <(box_namespaces)
    close_files
    setsid env --ignore-environment PATH="$PATH" HOME="${HOME:-/}" LANG=C.UTF-8 \
        VCLUSTER_DIR="$VCLUSTER_DIR" VCLUSTER_STATE="$state" VCLUSTER_NODES="$nodes" \
        unshare "${namespaces[@]}" bash "$here/lib/box.sh" box > "$state/log/box.log" 2>&1 < /dev/null &
    write_identity "$!" > "$state/run/box"
)

ready_or_dead() { [ -e "$state/run/ready" ] || [ -e "$state/run/failed" ] || ! identity_alive "$state/run/box"; }

namespaces_up() {
    local line="NodeName=node[1-$nodes] Port=6818" prefix=''
    if "$host_names"; then
        prefix=host-
        line+=" NodeHostname=host-node[1-$nodes] NodeAddr=10.77.0.[101-$((100 + nodes))]"
        touch "$state/host-names"
    fi
    all_shares > "$state/shares"
    {
        echo "127.0.0.1 localhost"
        echo "10.77.0.1 login"
        for ((i = 1; i <= nodes; i++)); do echo "10.77.0.$((100 + i)) ${prefix}node$i"; done
    } > "$state/hosts"
    render "login(10.77.0.1)" 6817 /etc/slurm "$line"
    mkfifo "$state/run/orders"
    start_box
    until_true 150 ready_or_dead && [ -e "$state/run/ready" ]
}

namespaces_down() {
    local box
    [ -e "$state/run/box" ] && identity_alive "$state/run/box" || return 0
    read -r box _ < "$state/run/box"
    # Process 1 of the box takes all processes along, and ends only after them; unshare after that.
    kill -KILL "$(children "$box")" 2> /dev/null || kill -KILL "$box"
    until_true 30 gone "$box" || die "processes of the cluster do not die" "look for processes in state D: ps -eo pid,stat,cmd"
    until_true 0 test ! -e "/proc/$box" # a moment for the host's init to collect it; not every container's does
}

# namespaces_pid MACHINE: pid, on this host, of the machine's process 1; false if it has no power
namespaces_pid() {
    local box parent child
    [ -e "$state/run/box" ] && identity_alive "$state/run/box" || return
    read -r box _ < "$state/run/box"
    box=$(children "$box")
    for parent in $(children "$box"); do
        [[ "$(tr '\0' ' ' < "/proc/$parent/cmdline")" == *" machine $1 "* ]] || continue
        child=$(children "$parent")
        [ -n "$child" ] && echo "$child"
        return
    done 2> /dev/null
    return 1
}

# namespaces_run MACHINE CMD...: replaces this process
namespaces_run() {
    local machine=$1 pid python
    shift
    pid=$(namespaces_pid "$machine") || die "$machine has no power" "$here/vcluster start-node $machine"
    python=$(command -v python3)
    export SLURM_CONF=/etc/slurm/slurm.conf PATH=$users_path
    # -I -S: without the user's modules, and quick
    exec "$python" -I -S "$here/lib/enter.py" "$machine" "$pid" "$@"
}

namespaces_kill() { echo "kill $1" > "$state/run/orders"; }
namespaces_start() { echo "start $1" > "$state/run/orders"; }
