#!/bin/bash
# Run one stage's commands with their output in a log file of this attempt, the newest of which <log> points at.
#   stage.sh LOG ATTEMPT COMMAND… [--then COMMAND…]        LOG = logs/<experiment>/<rule>.log
# Exit codes 2 (bad input) and 3 (a gate failed) leave a marker that ends Snakemake's retries before they ask for nodes.
set -uo pipefail
log=$1 attempt=$2
shift 2
folder=${log%.log}
export SLURM_RESTART_COUNT=${SLURM_RESTART_COUNT:-${DEEPSEEK_SFT_RESTARTS:-0}} # the jobstep plugin removes it
# A requeued job goes on under the same id, in a log of its own.
file=$folder/${SLURM_JOB_ID:-local-$$}-$((attempt + SLURM_RESTART_COUNT)).log
marker=$folder/do-not-retry
space() { df -h --output=avail,size,target "${folder%/*}" 2>/dev/null | awk 'NR == 2 { print $1 " of " $2 " are free on " $3 }'; }
probe() { head -c 65536 /dev/zero > "$folder/.probe.$$" && rm -f "$folder/.probe.$$"; }
# A log that cannot be written would hide whatever the stage says, so the stage does not begin.
if ! said=$({ mkdir -p "$folder" && ln -sfn "${folder##*/}/${file##*/}" "$log" && probe; } 2>&1); then
    echo "error: the log $file cannot be written: ${said##*: }; $(space)" >&2
    echo "  fix: free space there, or have its permissions mended; then run the same command again" >&2
    exit 2
fi
echo "output: $file" >&2
if [ "$attempt" -gt 1 ] && [ -e "$marker" ]; then
    echo "not retried: $(cat "$marker")" | tee -a "$file" >&2
    exit 3
fi
rm -f "$marker"
# What the attempt takes, for the cost that status and report tell; who is killed writes no end, the log's time stands for it.
took() { printf '%s\t%s\t%s\t%s\n' "$1" "${file##*/}" "$(date +%s)" "$2" >> "$folder/attempts.tsv"; }
took begin "${SLURM_JOB_NUM_NODES:-1}"$'\t'"${SLURM_GPUS_ON_NODE:-}" 2>/dev/null
run() { # COMMAND… [--then COMMAND…]
    local words=()
    while [ $# -gt 0 ] && [ "$1" != --then ]; do
        words+=("$1")
        shift
    done
    "${words[@]}" || return
    [ $# -eq 0 ] || run "${@:2}"
}
code=0
for word in "$@"; do
    case $word in "no path: "*) # receipt_path.py: the command would run without it
        printf '%s\n' "${word#no path: }" | tee -a "$file" >&2
        code=2 ;;
    esac
done
if [ "$code" -eq 0 ]; then
    run "$@" >> "$file" 2>&1
    code=$?
fi
took end "$code" 2>/dev/null
if [ "$code" -ne 0 ]; then
    if [ -n "${SLURM_JOB_ID-}" ]; then # the log of the Slurm job then says why; at a terminal the run's end does
        echo "exit code $code; last lines of $file:" >&2
        tail -n 25 "$file" >&2
    else
        echo "exit code $code, see $file" >&2
    fi
    if ! said=$(probe 2>&1); then
        echo "error: the log $file lacks its end: ${said##*: }; $(space)" >&2
    fi
    # Slurm kills the whole step, the program that could have said so included.
    mapfile -t killed < <(grep -aE 'slurmstepd.*(memory limit|oom.?kill)|srun: error: .*(Out Of Memory|Killed)' "$file" | sort -u)
    if [[ ${killed[*]-} =~ memory\ limit|oom.?kill|Out\ Of\ Memory ]]; then
        echo "error: ${folder##*/}: Slurm killed the step for lack of memory:" >&2
        printf '  %s\n' "${killed[@]}" >&2
        echo "  fix: raise \`mem_mb\` of this rule in the profile" >&2
    fi
    case $code in 2 | 3) echo "attempt $attempt ended with exit code $code, see $file" > "$marker" ;; esac
fi
exit "$code"
