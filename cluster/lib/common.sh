#!/bin/bash
# Sourced by cluster/vcluster and lib/box.sh.

# until_true SECONDS COMMAND...: try again every 20 ms; false when time is up
until_true() {
    local deadline=$((SECONDS + $1 + 1))
    shift
    until "$@" > /dev/null 2>&1; do
        [ "$SECONDS" -lt "$deadline" ] || return 1
        sleep 0.02
    done
}

# children PID: one per line
children() { tr ' ' '\n' < "/proc/$1/task/$1/children" 2> /dev/null; }

# write_identity PID: a pid that a later look cannot confuse with another process of the same number
write_identity() {
    local stat
    stat=$(< "/proc/$1/stat") || return
    read -ra stat <<< "${stat##*) }"
    echo "$1 ${stat[19]} $(< /proc/sys/kernel/random/boot_id)"
}

# identity_alive FILE: is the process that write_identity described still there?
identity_alive() {
    local pid rest
    read -r pid rest < "$1" && ! gone "$pid" && [ "$(write_identity "$pid")" = "$pid $rest" ]
}

gone() {
    local stat
    stat=$(cat "/proc/$1/stat" 2> /dev/null) || return 0
    [[ ${stat##*) } == Z* ]] # a zombie only waits for whoever started it
}

# Daemons must not hold what the caller has open: `vcluster up | cat` would never end.
close_files() {
    local handle
    for handle in /proc/self/fd/*; do
        handle=${handle##*/}
        [ "$handle" -le 2 ] || [ "$handle" -eq 255 ] || eval "exec $handle>&-" 2> /dev/null
    done
}
