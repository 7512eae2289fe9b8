#!/bin/bash
# Bring a stage's environment and our code to this node's own disk; started once on each node before anything else.
#   local_copies.sh ARCHIVE ENVIRONMENT PROJECT CODE
# ARCHIVE (.tar, .squashfs; made by build_env.py --archive) becomes the folder ENVIRONMENT, PROJECT's workflow folder is
# copied to CODE/workflow. Both folders are named by their content, so that what is there already is taken as it is.
set -euo pipefail
trap '' USR1 # Slurm's signal is for training
archive=$1 environment=$2 project=$3 code=$4
root=${environment%/*}
fail() { # PROBLEM FIX
    echo "error: $(hostname): $1" >&2
    echo "  fix: $2" >&2
    exit 2
}

umask 077
mkdir -p "$root" 2> /dev/null || true
if [ ! -d "$root" ] || [ ! -w "$root" ] || [ ! -O "$root" ]; then
    fail "$root is not a folder of ours to write" "set envs.local.folder to a folder on the nodes' own disks"
fi
[ -r "$archive" ] || fail "$archive cannot be read" "build it where the network is: snakemake envs"
case $(readlink -f "$archive") in # .envs/train.tar is a link to train-<hash of the lock>.tar
    *"/${environment##*/}".*) ;;
    *) fail "$archive is of another lock than $environment" "pack it again: snakemake envs" ;;
esac
exec 9> "$environment.lock"
flock 9

unpacked() { # COMMAND… that fills $environment.part
    rm -rf "$environment.part"
    mkdir "$environment.part"
    if ! "$@"; then
        rm -rf "$environment.part"
        fail "$archive could not be unpacked to $root ($(df -h --output=avail "$root" | tail -n 1 | tr -d ' ') are free)" \
            "see above; make room, or set envs.local.folder to a larger disk of the node's own"
    fi
    rm -rf "$environment"
    mv "$environment.part" "$environment"
}

if [ ! -e "$environment/complete.json" ]; then
    started=$SECONDS
    case $archive in
        *.tar) unpacked tar --extract --file "$archive" --directory "$environment.part" && how=unpacked ;;
        *.squashfs)
            mkdir -p "$environment"
            # The loop device is the kernel's and needs root; squashfuse is the user's; else the files are copied.
            if [ "$(id -u)" -eq 0 ] && mount -t squashfs -o loop,ro "$archive" "$environment" 2> /dev/null; then
                how=mounted
            elif command -v squashfuse > /dev/null && squashfuse "$archive" "$environment" 9>&- 2> /dev/null; then
                how='mounted by squashfuse'
            elif command -v unsquashfs > /dev/null; then
                unpacked unsquashfs -no-progress -quiet -force -dest "$environment.part" "$archive" > /dev/null && how=unpacked
            else
                fail "nothing here mounts or unpacks squashfs" "install squashfuse on the nodes, or set envs.local.train: tar"
            fi
            ;;
        *) fail "$archive is neither .tar nor .squashfs" "build it with build_env.py --archive" ;;
    esac
    [ -e "$environment/complete.json" ] || fail "$archive holds no complete environment" "build it again: snakemake envs"
    echo "$(hostname): $environment $how in $((SECONDS - started)) s"
fi

if [ ! -e "$code/workflow" ]; then
    rm -rf "$code.part"
    mkdir -p "$code.part"
    cp --recursive --preserve=timestamps "$project/workflow" "$code.part/workflow"
    mkdir -p "$code"
    mv "$code.part/workflow" "$code/workflow"
    rm -rf "$code.part"
fi
