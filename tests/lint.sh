#!/bin/bash
# Every linter; exits non-zero at the end if one complained.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2
failed=0
check() {
    echo "== $*"
    "$@" || failed=1
}
check ruff check .
check ruff format --check .
check snakefmt --check Snakefile workflow/rules
check python workflow/scripts/document_config.py --check
check codespell
check shellcheck --external-sources cluster/install cluster/image cluster/pyxis/srun cluster/pyxis/contain cluster/run cluster/vcluster cluster/lib/*.sh tests/lint.sh workflow/scripts/stage.sh workflow/scripts/local_copies.sh workflow/snakemake.sbatch profiles/containers/*-python workflow/slurm_commands/sbatch workflow/slurm_commands/squeue tests/drills/python .ci/run
check shellcheck tests/golden/*.sbatch

# Snakemake's only complaint may be that rules name no conda environment or container: ours are locked under envs/.
echo "== snakemake --lint"
snakemake --lint --configfile config/experiments/demo.yaml 2>&1 | grep -E '^    \*' | grep -v 'Specify a conda environment or container'
[ "${PIPESTATUS[2]}" -eq 1 ] || failed=1
[ "$failed" -eq 0 ] && echo "all linters are content"
exit "$failed"
