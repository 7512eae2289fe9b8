#!/bin/bash
# The inside of the emulated cluster; started by cluster/vcluster, never by hand. Each part runs as process 1 of namespaces:
#   box                    holds everything: the bridge that joins the machines, and the right (capabilities) to start more
#   machine NAME ADDRESS   one machine: the login node (munged, slurmctld) or a compute node (slurmd)
# In the environment: VCLUSTER_STATE (the state folder), VCLUSTER_NODES (how many).
set -u
self=$(readlink -f "${BASH_SOURCE[0]}")
state=$VCLUSTER_STATE
slurm=/etc/slurm # where every machine sees $state: the default place, because Snakemake's jobstep plugin drops SLURM_CONF
network=10.77.0  # private to the box, so two clusters can have the same

# shellcheck source=common.sh
. "${self%/*}/common.sh"
# shellcheck source=accounting.sh
. "${self%/*}/accounting.sh"

# Process 1 must stay and take up orphans, or zombies pile up; bash does while it waits.
stay() {
    while :; do
        sleep infinity &
        wait $!
    done
}

# ---------------------------------------------------------------------------------------------------------------- box

machines() {
    echo "login $network.1"
    for ((i = 1; i <= VCLUSTER_NODES; i++)); do echo "node$i $network.$((100 + i))"; done
}

has_own_network() { [ "$(readlink "/proc/$1/ns/net")" != "$(readlink /proc/self/ns/net)" ]; }

# start_machine NAME ADDRESS: new namespaces, and a cable (veth pair, named like the machine here and eth0 there)
start_machine() {
    local name=$1 address=$2
    unshare --net --uts --ipc --mount --pid --fork --kill-child=KILL --mount-proc \
        bash "$self" machine "$name" "$address" > "$state/log/$name.log" 2>&1 < /dev/null 3<&- &
    parents[$name]=$!
    until_true 5 has_own_network "${parents[$name]}" || return
    ip link add "$name" type veth peer name eth0 netns "${parents[$name]}" && ip link set "$name" master switch up
}

# Loss of power: first the cable, so that no connection is closed politely and the others must find out by themselves.
kill_machine() {
    local name=$1
    ip link delete "$name"
    # Its process 1 takes all others along, and is gone (so that unshare ends) only after them.
    kill -KILL "$(children "${parents[$name]}")"
    wait "${parents[$name]}"
    rm -f "$state/run/slurmd-$name.pid"
}

box() {
    declare -A parents=()
    local order name address
    ip link set lo up
    ip link add switch type bridge
    ip link set switch up
    while read -r name address; do start_machine "$name" "$address"; done < <(machines)
    # Orders come through a pipe: when an ordinary user enters this namespace from outside, exec drops the capabilities
    # that starting a machine needs; only this process, a child of unshare --keep-caps, has them.
    exec 3<> "$state/run/orders"
    while read -r order name <&3; do
        case $order in
            start) start_machine "$name" "$network.$((100 + ${name#node}))" ;;
            kill) kill_machine "$name" ;;
        esac
    done
}

# ------------------------------------------------------------------------------------------------------------ machine

# private_folder FOLDER: the machine's own, except for the shared folders below it. $slurm serves as the place to build it.
private_folder() {
    local folder=$1 share
    mount -t tmpfs -o mode=1777 tmpfs "$slurm" || return
    while read -r share; do
        [[ $share == "$folder"/* ]] || continue
        mkdir -p "$slurm/${share#"$folder"/}" && mount --rbind "$share" "$slurm/${share#"$folder"/}" || return
    done < "$state/shares"
    mount --rbind "$slurm" "$folder" && umount --recursive --lazy "$slurm"
}

own_files() {
    # The login node keeps the user's /tmp: commands that come from outside may have files there.
    [ "$1" = login ] || private_folder /tmp || return
    private_folder /dev/shm || return
    mount --bind "$state/hosts" /etc/hosts || return
    # A dangling link cannot be covered, and then there are no name servers to wait for either.
    mount --bind /dev/null /etc/resolv.conf 2> /dev/null
    mount --bind "$state" "$slurm"
}

own_network() {
    ip link set lo up
    until_true 5 ip link show eth0 || return
    ip address add "$1/24" dev eth0 && ip link set eth0 up
}

# daemon COMMAND...: as it would be started at boot. An ordinary user's capabilities (they hold inside the box only, but
# let jobs write to read-only files) are dropped, and SIGINT, which & made ignored for all of us, counts again.
daemon() {
    local drop=()
    [ "$(id -u)" = 0 ] || drop=(setpriv --inh-caps=-all --ambient-caps=-all)
    "${drop[@]}" env --default-signal=INT,QUIT "$@"
}

all_nodes_ready() {
    [ "$(sinfo --noheader --partition=cpu --states=idle --responding --format=%D)" = "$VCLUSTER_NODES" ]
}

login_node() {
    # --force: in a user namespace root's folders look like nobody's, and munged calls them insecure.
    daemon munged --force --key-file="$slurm/munge/key" --socket="$slurm/run/munge" --pid-file="$slurm/munge/pid" \
        --log-file="$slurm/log/munged.log" --seed-file="$slurm/munge/seed" --num-threads=2 || return
    [ ! -e "$slurm/slurmdbd.conf" ] || start_accounting || return
    daemon slurmctld || return
    touch "$slurm/run/login"
    until_true 20 all_nodes_ready || return
    touch "$slurm/run/ready"
}

compute_node() {
    until_true 120 test -e "$slurm/run/login" || return # a database takes its time
    mkdir -p "$slurm/spool/$1"
    daemon slurmd -N "$1"
}

machine() {
    local name=$1 address=$2
    hostname "$name"
    [ "$name" = login ] || [ ! -e "$state/host-names" ] || hostname "host-$name"
    if ! own_files "$name" || ! own_network "$address"; then
        echo "error: $name did not get its folders and network"
        exit 1
    fi
    cd / || exit
    export SLURM_CONF=$slurm/slurm.conf
    if [ "$name" = login ]; then login_node || touch "$slurm/run/failed"; else compute_node "$name"; fi || exit
    stay
}

"$@"
