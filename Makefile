# Every target is one command on a fresh machine: it makes .venv and installs what it needs if that is missing.
.DEFAULT_GOAL := help
SHELL := /bin/bash

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

DATASET ?= fashion-mnist
RECIPE ?= cosine
CLUSTER ?= cpu
RUN ?= $(DATASET)-$(subst $(eval ) ,-,$(strip $(RECIPE)))
DATA ?= data/shards/$(DATASET)
IMAGES ?=
IMAGE ?=
NAME ?= stage2_step
TOKENIZER ?=
PRETRAINED ?=
STAGE ?= transformer
NODES ?=
DEVICES ?=
TIME ?=
CLASSES ?= all
STEPS ?=
SEED ?= 0
ARGS ?=
WORKERS ?= auto

# The run that every stage belongs to. RECIPE may name several recipes, from left to right: RECIPE='paper-256 log'.
OF_RUN = --dataset $(DATASET) --data $(DATA) --recipe "$(RECIPE)" --run "$(RUN)" $(if $(TOKENIZER),--tokenizer "$(TOKENIZER)") $(if $(PRETRAINED),--pretrained "$(PRETRAINED)")
MACHINES = $(if $(NODES),--nodes $(NODES)) $(if $(DEVICES),--devices $(DEVICES))

.PHONY: doctor help install data train-tokenizer tokenize train-transformer submit-tokenizer submit-transformer sample evaluate compare tune train-classifier ablation edit benchmark demo demo-short test mutants test-slurm lint format clean

help: ## Print every target
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1|\2/' | column -t -s '|'
	@echo "Variables: DATASET RECIPE CLUSTER RUN DATA IMAGES TOKENIZER PRETRAINED STAGE NODES DEVICES TIME IMAGE CLASSES STEPS SEED NAME WORKERS ARGS"

$(STAMP): pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	@touch $@

install: $(STAMP) ## Make .venv with the package and its tools

data: $(STAMP) ## Fetch DATASET and write its shards; own images: DATASET=name IMAGES=folder
	@$(if $(IMAGES),$(BIN)/maskgit data make "$(IMAGES)" --out $(DATA),$(if $(wildcard data/$(subst -,_,$(DATASET)).py),$(BIN)/python data/$(subst -,_,$(DATASET)).py --out $(DATA),test -d $(DATA) || { echo "data $(DATA): not there; name your images with IMAGES=folder" >&2; exit 2; }))

doctor: $(STAMP) ## Check a run before it is started: STAGE=transformer RECIPE=paper-256 CLUSTER=fsdp NODES=4 DEVICES=8
	@$(BIN)/maskgit doctor $(STAGE) $(OF_RUN) --cluster $(CLUSTER) $(MACHINES) $(ARGS)

train-tokenizer: $(STAMP) ## Stage 1: train the VQGAN on DATA (go on with the run if there is one)
	@$(BIN)/maskgit train tokenizer $(OF_RUN) --cluster $(CLUSTER) $(ARGS)

tokenize: $(STAMP) ## Turn the images of DATA into tokens, once; all runs with the same tokenizer and data share them
	@$(BIN)/maskgit tokenize $(OF_RUN) --cluster $(CLUSTER) $(ARGS)

train-transformer: tokenize ## Stage 2: train the transformer, e.g. RECIPE=cosine CLUSTER=ddp
	@$(BIN)/maskgit train transformer $(OF_RUN) --cluster $(CLUSTER) $(ARGS)

# On a cluster the recipes' `ddp` is meant where the laptop's `cpu` is elsewhere.
SUBMIT = $(OF_RUN) --cluster $(if $(filter file,$(origin CLUSTER)),ddp,$(CLUSTER)) $(MACHINES) $(if $(TIME),--time $(TIME)) $(ARGS)

submit-tokenizer: $(STAMP) ## Stage 1 on Slurm: NODES=2 DEVICES=8 TIME=24:00:00 ARGS="--partition gpu" (docs/slurm.md)
	@$(BIN)/maskgit slurm submit tokenizer $(SUBMIT)

submit-transformer: $(STAMP) ## Stage 2 on Slurm: RECIPE=cosine NODES=4 CLUSTER=fsdp
	@$(BIN)/maskgit slurm submit transformer $(SUBMIT)

sample: $(STAMP) ## Generate images of RUN: CLASSES=0,3,7 STEPS=16 SEED=0
	@$(BIN)/maskgit sample runs/$(RUN) --classes "$(CLASSES)" $(if $(STEPS),--num-steps $(STEPS)) --seed $(SEED) --out runs/$(RUN)/sampled.png $(ARGS)

edit: $(STAMP) ## Generate a part of an image anew: IMAGE=file ARGS="--box L,T,R,B --class NAME --out FILE.png"
	@$(BIN)/maskgit edit runs/$(RUN) "$(IMAGE)" $(ARGS)

evaluate: $(STAMP) ## Measure RUN and write its evaluation.json and pictures
	@$(BIN)/maskgit evaluate runs/$(RUN) --data $(DATA) $(ARGS)

compare: $(STAMP) ## Measure every token selector on RUN at several T, with the same noise: ARGS="--num-steps 4,8"
	@$(BIN)/maskgit compare runs/$(RUN) --data $(DATA) $(ARGS)

tune: $(STAMP) ## Search for a better way to decode RUN and keep it beside its weights: ARGS="--trials 40"
	@$(BIN)/maskgit tune runs/$(RUN) --data $(DATA) $(ARGS)

train-classifier: $(STAMP) ## Train a classifier of DATA, which judges generated images: ARGS="--model resnet18"
	@$(BIN)/maskgit train-classifier --data $(DATA) $(ARGS)

ablation: $(STAMP) ## Train every mask schedule of the paper on DATASET, then Table 3 and Figure 8 (goes on where it was)
	@$(BIN)/maskgit ablation --dataset $(DATASET) --data $(DATA) --cluster $(CLUSTER) $(ARGS)

demo: ## From nothing to images: data, both stages, pictures and figures
	@$(MAKE) --no-print-directory data
	@$(MAKE) --no-print-directory train-tokenizer CLUSTER=$(CLUSTER)
	@$(MAKE) --no-print-directory train-transformer CLUSTER=$(CLUSTER)
	@$(MAKE) --no-print-directory evaluate ARGS="--features classifier"

SHORT = --trainer.max_steps=60 --trainer.val_check_interval=60 --data.validation_samples=500

demo-short: ## Every stage of the demo on real data, anew, in 60 steps each
	@rm -rf runs/demo-short
	@$(MAKE) --no-print-directory data
	@$(MAKE) --no-print-directory train-tokenizer RUN=demo-short ARGS="$(SHORT)"
	@$(MAKE) --no-print-directory train-transformer RUN=demo-short ARGS="$(SHORT)"
	@$(MAKE) --no-print-directory evaluate RUN=demo-short ARGS="--num-images 50 --features classifier"

benchmark: $(STAMP) ## Measure ours against the alternatives: NAME=stage2_step (benchmarks/README.md)
	@OMP_WAIT_POLICY=PASSIVE $(BIN)/python benchmarks/$(NAME).py $(ARGS)

test: $(STAMP) ## Run the tests (quick ones alone: ARGS="-m 'not slow'")
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --maxprocesses 8 --dist worksteal $(ARGS)

mutants: $(STAMP) ## Break the package in one place after the other: do the quick tests notice? ARGS="--only masking.py"
	@$(BIN)/python tests/mutation/run.py $(ARGS)

AS_ROOT = $(if $(filter 0,$(shell id -u)),,sudo --non-interactive)
SLURM_INSTALL = $(AS_ROOT) apt-get -qq update && $(AS_ROOT) apt-get -qq install --yes --no-install-recommends slurmctld slurmd slurm-client >/dev/null
SLURM_MISSING = Slurm: slurmctld, slurmd and slurm-client are needed, and root to start them; on Debian or Ubuntu root or sudo installs them here

test-slurm: $(STAMP) ## Train on a real Slurm cluster of this machine (as root or by sudo; installs Slurm)
	@export PATH="$$PATH:/usr/sbin"; { command -v slurmctld && command -v slurmd && command -v scontrol; } >/dev/null || { $(SLURM_INSTALL); } || { echo "$(SLURM_MISSING)" >&2; exit 2; }
	@$(AS_ROOT) env PATH="$$PATH:/usr/sbin" OMP_WAIT_POLICY=PASSIVE SLURM_TRANSCRIPT="$(SLURM_TRANSCRIPT)" $(BIN)/python -m pytest tests/slurm --durations=10 --durations-min=1 $(ARGS)

lint: $(STAMP) ## Check style, types and shell scripts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck recipes/slurm/train.sbatch tests/slurm/cluster.sh .ci/run docs/decoding/sheets.sh

format: $(STAMP) ## Put the code into the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove the environment and caches; runs and data stay
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache build dist
