# make demo · make status · make watch · make check · make test · make families · make soak · make lint · make clean        PYTHON: a Python 3.11 with venv and pip
PYTHON ?= python3
# Test files run side by side: most of them wait for clusters and trainers more than they compute.
WORKERS ?= 3
DEMO := --configfile config/experiments/demo.yaml
ENV := .envs/workflow/bin
DEV := .envs/dev/bin
GPU_PYTHON ?= .envs/train/bin/python

.PHONY: help demo status watch track envs test test-swap families drills drills-without evaluation soak soak-slurm containers resume-full-size expert-spreads async-save-kills mutations gpu-check gpu-check-cpu check lint format clean

help:
	@echo "make demo   raw chats → trained, converted, served and tested model on an emulated Slurm cluster"
	@echo "make status how far a run is; RESULTS=results/<experiment> for one that was not active last"
	@echo "make watch  the same as a page that stays open, for a browser here or over ssh; RESULTS as above, PORT=8765"
	@echo "make track  give a run to MLflow and Weights & Biases (tracking: of its configuration); RESULTS=results/<experiment>"
	@echo "make test   every test, the demo chain included"
	@echo "make test-swap   as root: conversion with a real swap file, which is switched on and off"
	@echo "make families   a tiny base of each family (Moonlight, Kimi-K2, GigaChat3) through the whole chain; about 25 minutes"
	@echo "make evaluation   the demo and an early step of it, both evaluated on 100 questions: one passes its gates, one fails; about 15 minutes"
	@echo "make drills   time limits, preemption, deaths of Snakemake, nodes and controller, on an emulated cluster; about 75 minutes"
	@echo "make drills-without   each mechanism behind them taken out once: its drill must fail; about 35 minutes"
	@echo "make expert-spreads   experts spread over ranks with every pair of other settings, 20 runs beside a plain loop; about 3 minutes"
	@echo "make soak   training runs that random faults befall; SOAK='--runs 20 --seed 7 --folder DIR', see tests/drills/soak.py"
	@echo "make soak-slurm  the same under Slurm, on an emulated cluster; SOAK_RUNS=10 SOAK_SEED=18"
	@echo "make containers  as root: the demo's training in an image built from its lock, by podman and a stand-in for Pyxis; about 15 minutes"
	@echo "make mutations   2,000 random changes of each shipped configuration: what the start accepts every stage accepts; about 4 minutes"
	@echo "make resume-full-size   671B of 256 ranks read by 128 and by 192, and planned for conversion with its experts spread over 1, 8, 64; about 6 minutes"
	@echo "make async-save-kills   training killed twenty times while a checkpoint is written; KILLS='--kills 20 --seed 30', about 5 minutes, 20 on a busy machine"
	@echo "make gpu-check   on a machine with an NVIDIA GPU: kernels, memory, DeepSpeed, tools; GPU_PYTHON=a Python with torch 2.11 or newer"
	@echo "make gpu-check-cpu   the same code on a CPU, at small sizes"
	@echo "make check  linters and unit tests of what changed since this branch left main; SINCE=COMMIT for another one"
	@echo "make lint   ruff, snakefmt, codespell, snakemake --lint, shellcheck"
	@echo "make clean  results, logs and environments of this checkout"

demo:
	@cluster/install
	@$(PYTHON) workflow/scripts/build_env.py workflow
	@# the nodes have no network, so environments are built before the cluster starts
	@$(ENV)/snakemake --profile profiles/local $(DEMO) --quiet all -- envs
	@cluster/run --nodes 4 -- env PYTHONPATH=$(CURDIR)/cluster/fastpoll $(ENV)/snakemake --profile profiles/demo $(DEMO)
	@$(ENV)/python workflow/scripts/build_report.py --summary results/demo

status:
	@$(PYTHON) workflow/scripts/build_env.py workflow
	@$(ENV)/python workflow/scripts/status.py $(RESULTS)

track:
	@$(PYTHON) workflow/scripts/build_env.py track
	@.envs/track/bin/python workflow/scripts/track.py $(RESULTS)

watch:
	@$(PYTHON) workflow/scripts/build_env.py workflow
	@$(ENV)/python workflow/scripts/watch.py $(RESULTS) --port $(or $(PORT),0)

envs:
	@$(PYTHON) workflow/scripts/build_env.py workflow
	@$(PYTHON) workflow/scripts/build_env.py dev
	@$(PYTHON) workflow/scripts/build_env.py train
	@$(PYTHON) workflow/scripts/build_env.py serve-cpu
	@$(PYTHON) workflow/scripts/build_env.py evaluate

test: envs
	@cluster/install
	@$(DEV)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations 40

test-swap:
	@$(PYTHON) workflow/scripts/build_env.py dev
	@$(DEV)/python -m pytest tests/swap_real.py

families:
	@$(PYTHON) workflow/scripts/build_env.py dev
	@$(PYTHON) workflow/scripts/build_env.py workflow
	@$(PYTHON) workflow/scripts/build_env.py train
	@$(PYTHON) workflow/scripts/build_env.py serve-cpu
	@rm -f families.jsonl
	@$(DEV)/python -m pytest -s tests/drills/family_drills.py

evaluation: envs
	@$(DEV)/python -m pytest -s tests/drills/evaluation_drills.py

drills:
	@cluster/install --accounting
	@$(PYTHON) workflow/scripts/build_env.py workflow
	@$(PYTHON) workflow/scripts/build_env.py dev
	@rm -f drills.jsonl
	@$(DEV)/python -m pytest -s tests/drills/slurm_drills.py tests/drills/warning_drills.py tests/drills/refusal_drills.py \
		tests/drills/accounting_drills.py tests/drills/stock_drills.py

# each mechanism taken out once: its drill must fail
drills-without:
	@cluster/install
	@$(PYTHON) workflow/scripts/build_env.py workflow
	@$(PYTHON) workflow/scripts/build_env.py dev
	@$(DEV)/python -m pytest -s tests/drills/without_drills.py

soak:
	@$(PYTHON) workflow/scripts/build_env.py dev
	@$(PYTHON) workflow/scripts/build_env.py train
	@$(DEV)/python tests/drills/soak.py $(SOAK)

resume-full-size:
	@$(PYTHON) workflow/scripts/build_env.py dev
	@$(DEV)/python tests/full_size_resume.py
	@FULL_SIZES=1 $(DEV)/python -m pytest tests/stages/test_checkpoint_large.py -k full_size

expert-spreads:
	@$(PYTHON) workflow/scripts/build_env.py dev
	@$(PYTHON) workflow/scripts/build_env.py train
	@$(DEV)/python tests/expert_spreads.py

async-save-kills:
	@$(PYTHON) workflow/scripts/build_env.py dev
	@$(PYTHON) workflow/scripts/build_env.py train
	@$(DEV)/python tests/drills/async_save_kills.py $(KILLS)

containers:
	@cluster/install
	@$(PYTHON) workflow/scripts/build_env.py workflow
	@$(PYTHON) workflow/scripts/build_env.py dev
	@$(PYTHON) workflow/scripts/build_env.py train
	@rm -f containers.jsonl
	@$(DEV)/python -m pytest -s tests/drills/container_drills.py

soak-slurm:
	@cluster/install
	@$(PYTHON) workflow/scripts/build_env.py workflow
	@$(PYTHON) workflow/scripts/build_env.py dev
	@$(PYTHON) workflow/scripts/build_env.py train
	@SOAK_RUNS=$(or $(SOAK_RUNS),10) SOAK_SEED=$(or $(SOAK_SEED),18) $(DEV)/python -m pytest -s tests/drills/soak_on_slurm.py

mutations:
	@$(PYTHON) workflow/scripts/build_env.py dev
	@SETTINGS_CASES=2000 $(DEV)/python -m pytest tests/unit/settings/test_mutations.py

gpu-check:
	@$(GPU_PYTHON) tests/gpu/check.py

gpu-check-cpu:
	@$(PYTHON) workflow/scripts/build_env.py train
	@.envs/train/bin/python tests/gpu/check.py --device cpu --small --output results/gpu-check-cpu.json

check:
	@$(PYTHON) workflow/scripts/build_env.py dev
	@PATH="$(CURDIR)/$(DEV):$$PATH" $(DEV)/python tests/changed.py $(SINCE)

lint:
	@$(PYTHON) workflow/scripts/build_env.py dev
	@PATH="$(CURDIR)/$(DEV):$$PATH" tests/lint.sh

format:
	@$(DEV)/ruff check --fix . && $(DEV)/ruff format . && $(DEV)/snakefmt Snakefile workflow/rules

clean:
	rm -rf results logs .snakemake .envs .cluster
