#!/bin/bash
# shellcheck disable=SC2154 # here, state and nodes are vcluster's
# Way A, sourced by cluster/vcluster: all nodes are slurmd daemons of this one machine, for places that forbid namespaces.
# Every node, and the login node's daemons, run below a process of their own (lib/reaper.py) that can end all of them.

flat_free_port() {
    local port
    for port in $(seq 17000 200 32000); do
        (exec 3<> "/dev/tcp/127.0.0.1/$port") 2> /dev/null || { echo "$port" && return; }
    done
    return 1
}

# Slurm's commands, told which configuration to read: Snakemake's jobstep plugin drops SLURM_CONF but keeps PATH.
flat_write_commands() {
    local name program
    mkdir -p "$state/bin"
    for name in srun sbatch salloc scancel squeue sinfo scontrol sacct sstat sattach; do
        program=$(command -v "$name") || continue
        printf '#!/bin/sh\nexport SLURM_CONF=%q\nexec %q "$@"\n' "$state/slurm.conf" "$program" > "$state/bin/$name"
        chmod 755 "$state/bin/$name"
    done
}

# Node names resolve only through libnss-wrapper: an ordinary user cannot write /etc/hosts.
flat_names_library() {
    ldconfig -p | sed -n 's/.*libnss_wrapper\.so[.0-9]* .*=> //p' | head -n 1
}

flat_environment() {
    local library
    library=$(flat_names_library)
    export SLURM_CONF=$state/slurm.conf PATH=$state/bin:$PATH
    [ -z "$library" ] || export LD_PRELOAD=$library${LD_PRELOAD:+:$LD_PRELOAD} NSS_WRAPPER_HOSTS=$state/hosts
}

# flat_start NAME: the reaper's pid goes to run/NAME
flat_start() (
    name=$1
    flat_environment
    export VCLUSTER_DIR
    close_files
    if [ "$name" = login ]; then
        commands="munged --force --key-file=$(quoted munge/key) --socket=$(quoted run/munge) \
            --pid-file=$(quoted munge/pid) --log-file=$(quoted log/munged.log) --seed-file=$(quoted munge/seed) \
            --num-threads=2 && slurmctld"
    else
        mkdir -p "$state/spool/$name"
        commands="slurmd -N $name"
    fi
    setsid python3 -I "$here/lib/reaper.py" bash -c "$commands" > "$state/log/$name.log" 2>&1 < /dev/null &
    write_identity "$!" > "$state/run/$name"
)

quoted() { printf %q "$state/$1"; }

flat_pid() { [ -e "$state/run/$1" ] && identity_alive "$state/run/$1" && read -r pid _ < "$state/run/$1" && echo "$pid"; }

# flat_kill NAME: all processes of a node at once
flat_kill() {
    local pid
    pid=$(flat_pid "$1") || return 0
    kill -TERM "$pid"
    until_true 10 gone "$pid"
    rm -f "$state/run/$1" "$state/run/slurmd-$1.pid"
}

flat_node_lines() {
    local i
    for ((i = 1; i <= nodes; i++)); do
        echo "NodeName=node$i NodeHostname=$(hostname -s) NodeAddr=127.0.0.$((100 + i)) Port=$(($1 + i))"
    done
}

flat_hosts() {
    local i
    printf '127.0.0.1 localhost login %s\n' "$(hostname -s)"
    for ((i = 1; i <= nodes; i++)); do echo "127.0.0.$((100 + i)) node$i"; done
}

flat_up() {
    local port i
    # The path of a Unix socket holds 107 characters, and Slurm's own are the longest.
    [ ${#state} -le 60 ] || die "$state is too long a path for sockets" "set VCLUSTER_DIR to a shorter one"
    port=$(flat_free_port) || die "no free port between 17000 and 32000"
    flat_hosts > "$state/hosts"
    flat_write_commands
    render "$(hostname -s)(127.0.0.1)" "$port" "$state" "$(flat_node_lines "$port")"
    [ -n "$(flat_names_library)" ] || say "note: node names do not resolve here (apt-get install libnss-wrapper)"
    flat_start login
    until_true 10 test -S "$state/run/munge" || return
    for ((i = 1; i <= nodes; i++)); do flat_start "node$i"; done
    until_true 20 flat_all_nodes_ready
}

flat_all_nodes_ready() {
    [ "$(SLURM_CONF=$state/slurm.conf sinfo --noheader -p cpu --states=idle --responding --format=%D)" = "$nodes" ]
}

flat_down() {
    local file
    for file in "$state"/run/node* "$state/run/login"; do flat_kill "${file##*/}"; done
}

# flat_run MACHINE CMD...: replaces this process
flat_run() {
    flat_environment
    PATH=$state/bin:$users_path
    [ "$1" = login ] || export SLURMD_NODENAME=$1
    shift
    exec "$@"
}
