# Each target works on a fresh machine: it creates .venv and installs missing tools first.
.DEFAULT_GOAL := help
SHELL := /bin/bash

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEV_STAMP := $(VENV)/.installed-dev
LOWEST := .venv-lowest

# `make help` prints the lines that begin with "#:".
#: DATASET|Name of the data set (default: fashion-mnist)
#: DATA|Folder of its shards (default: data/shards/DATASET)
#: IMAGES|Folder or archive of your own images, or hf:OWNER/NAME, which `make data` converts
#: RECIPE|Recipes, merged from left to right (default: adaln)
#: BUDGET|Recipe for a time, merged after RECIPE: 15m, 1h or overnight on a CPU core, gpu-1h (default: 15m, but none with RECIPE or fashion-mnist)
#: RUN|Name of the run folder in runs/ (default: DATASET-RECIPE, or DATASET-RECIPE-BUDGET)
#: CLUSTER|single, ddp or fsdp (default: single; on Slurm: ddp)
#: TOKENIZER|Pretrained tokenizer for stage 2 (default: that of the run)
#: PRETRAINED|Pretrained folder whose weights a run starts from
#: STAGE|Stage that `make doctor` checks: tokenizer or transformer (default: transformer)
#: NODES|Number of nodes
#: DEVICES|Number of devices per node
#: TIME|Time limit of a Slurm job
#: CLASSES|Names or indices of the classes that `make sample` generates (default: all)
#: NUM_STEPS|Decoding steps of `make sample` (default: those of the model)
#: SEED|Seed of the first image (default: 0)
#: IMAGE|Image file that `make edit` changes
#: NAME|Benchmark to run (default: stage2_step)
#: WORKERS|Processes that run the tests (default: auto)
#: ARGS|Any further flags of the command
DATASET ?= fashion-mnist
# The temperatures of `adaln` without a budget suit Fashion-MNIST.
BUDGET ?= $(if $(RECIPE)$(filter fashion-mnist,$(DATASET)),,15m)
BUDGET := $(BUDGET)
RECIPE ?= adaln
CLUSTER ?= single
RUN ?= $(DATASET)-$(subst $(eval ) ,-,$(strip $(RECIPE) $(BUDGET)))
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
NUM_STEPS ?=
SEED ?= 0
ARGS ?=
WORKERS ?= auto
FETCHED = fashion-mnist blue-marble blue-marble-64 emoji

# make itself ignores a misspelt variable, such as NUM_STEP.
VARIABLES := $(sort $(shell sed -nE 's/^.: ([A-Z_]+)\|.*/\1/p' $(firstword $(MAKEFILE_LIST))))
GIVEN := $(foreach name,$(.VARIABLES),$(if $(filter command,$(origin $(name))),$(name)))
UNKNOWN := $(filter-out $(VARIABLES) PYTHON VENV LOWEST CHROMIUM WEB_PICTURES,$(sort $(GIVEN)))
$(if $(UNKNOWN),$(error each variable must be one of $(VARIABLES), got $(UNKNOWN); see `make help`))
$(if $(and $(IMAGES),$(filter $(FETCHED),$(DATASET))),$(error DATASET must be a name of your own with IMAGES, got $(DATASET); set DATASET=NAME))

# Flags that select the run. RECIPE may name several recipes, merged from left to right: RECIPE='paper-256 log'.
OF_RUN = --dataset "$(DATASET)" --data "$(DATA)" --recipe "$(strip $(RECIPE) $(BUDGET))" --run "$(RUN)" $(if $(TOKENIZER),--tokenizer "$(TOKENIZER)") $(if $(PRETRAINED),--pretrained "$(PRETRAINED)")
MACHINES = $(if $(NODES),--nodes $(NODES)) $(if $(DEVICES),--devices $(DEVICES))

.PHONY: doctor help install data train-tokenizer tokenize train-transformer submit-tokenizer submit-transformer sample evaluate tune train-classifier ablation schedule-table paper edit web benchmark benchmarks benchmark-gpu demo demo-short test test-trainings test-exports test-survival test-benchmarks test-site test-gpu test-lowest test-wheel test-slurm docs test-web lint format clean

help: ## List the targets and the variables
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1|\2/' | column -t -s '|'
	@echo; echo "Variables, set as in: make sample NUM_STEPS=16"
	@sed -nE 's/^#: (.*)/  \1/p' $(MAKEFILE_LIST) | column -t -s '|'

INSTALL = -m pip install --quiet --disable-pip-version-check

# The package without extras, for everything but development.
$(STAMP): pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python $(INSTALL) --editable .
	@touch $@

$(DEV_STAMP): pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python $(INSTALL) --editable ".[dev]"
	@touch $(STAMP) $@

$(VENV)/.installed-web $(VENV)/.installed-tune: $(VENV)/.installed-%: $(STAMP)
	$(BIN)/python $(INSTALL) --editable ".[$*]"
	@touch $@

$(VENV)/.installed-test-web: $(DEV_STAMP)
	$(BIN)/python $(INSTALL) --editable ".[dev,test-web]"
	@touch $@

$(LOWEST)/.installed: pyproject.toml constraints/lowest.txt
	@test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python $(INSTALL) --constraint constraints/lowest.txt --editable ".[test]"
	@touch $@

install: $(DEV_STAMP) ## Create .venv with the package and the development tools

data: $(STAMP) ## Download DATASET and write its shards; for your own images: DATASET=name IMAGES=folder
	@$(if $(IMAGES),$(BIN)/maskgit data make "$(IMAGES)" --out "$(DATA)" $(ARGS),$(if $(filter $(FETCHED),$(DATASET)),$(BIN)/maskgit data fetch "$(DATASET)" --out "$(DATA)" $(ARGS),test -d "$(DATA)" || { echo "data $(DATA): no such folder; set IMAGES=folder to convert your own images, or DATASET to a data set that can be downloaded ($(FETCHED))" >&2; exit 2; }))

doctor: $(STAMP) ## Check a run before you start it: STAGE=transformer RECIPE=paper-256 CLUSTER=fsdp NODES=4 DEVICES=8
	@$(BIN)/maskgit doctor $(STAGE) $(OF_RUN) --cluster $(CLUSTER) $(MACHINES) $(ARGS)

train-tokenizer: $(STAMP) ## Stage 1: train the VQGAN on DATA, or resume the run
	@$(BIN)/maskgit train tokenizer $(OF_RUN) --cluster $(CLUSTER) $(ARGS)

tokenize: $(STAMP) ## Encode the images of DATA as tokens; runs with the same tokenizer and data share them
	@$(BIN)/maskgit tokenize $(OF_RUN) --cluster $(CLUSTER) $(ARGS)

train-transformer: tokenize ## Stage 2: train the transformer, or resume the run; e.g. RECIPE=cosine CLUSTER=ddp
	@$(BIN)/maskgit train transformer $(OF_RUN) --cluster $(CLUSTER) $(ARGS)

# The default of CLUSTER is `ddp` on Slurm, and `single` elsewhere.
SUBMIT = $(OF_RUN) --cluster $(if $(filter file,$(origin CLUSTER)),ddp,$(CLUSTER)) $(MACHINES) $(if $(TIME),--time $(TIME)) $(ARGS)

submit-tokenizer: $(STAMP) ## Submit stage 1 to Slurm: NODES=2 DEVICES=8 TIME=24:00:00 ARGS="--sbatch=--partition=gpu" (docs/slurm.md)
	@$(BIN)/maskgit slurm submit tokenizer $(SUBMIT)

submit-transformer: $(STAMP) ## Submit stage 2 to Slurm: RECIPE=cosine NODES=4 CLUSTER=fsdp
	@$(BIN)/maskgit slurm submit transformer $(SUBMIT)

sample: $(STAMP) ## Generate images of RUN: CLASSES=0,3,7 NUM_STEPS=16 SEED=0
	@$(BIN)/maskgit sample "runs/$(RUN)" --classes "$(CLASSES)" $(if $(NUM_STEPS),--num-steps $(NUM_STEPS)) --seed $(SEED) --out "runs/$(RUN)/sampled.png" $(ARGS)

edit: $(STAMP) ## Regenerate a region of an image: IMAGE=file ARGS="--box L,T,R,B --class NAME --out FILE.png"
	@$(if $(IMAGE),$(BIN)/maskgit edit "runs/$(RUN)" "$(IMAGE)" $(ARGS),echo "IMAGE must name an image file: make edit IMAGE=photo.jpg ARGS=..." >&2; exit 2)

web: $(VENV)/.installed-web ## Show a page in the browser: generate, edit with a brush; RUN=name for your own model, else the demo's
	@$(BIN)/maskgit web $(if $(filter file,$(origin RUN)),,"runs/$(RUN)") $(ARGS)

evaluate: $(STAMP) ## Evaluate RUN; write evaluation.json and pictures
	@$(BIN)/maskgit evaluate "runs/$(RUN)" --data "$(DATA)" $(ARGS)

tune: $(VENV)/.installed-tune ## Search for better decoding settings of RUN and save them with its weights: ARGS="--trials 40"
	@$(BIN)/maskgit tune "runs/$(RUN)" --data "$(DATA)" $(ARGS)

train-classifier: $(STAMP) ## Train a classifier on DATA, to evaluate generated images: ARGS="--model resnet18"
	@$(BIN)/maskgit train-classifier --data "$(DATA)" $(ARGS)

ablation: $(STAMP) ## Compare variants of a recipe: ARGS="--vary KEY=A,B"; or of the decoding of a model: ARGS="--of RUN --vary decoding.KEY=A,B"
	@$(BIN)/maskgit ablation --dataset "$(DATASET)" --data "$(DATA)" --cluster $(CLUSTER) $(ARGS)

# Each command is printed. What torch reads at its import is what `maskgit` sets.
paper: export OMP_WAIT_POLICY = PASSIVE
paper: export MKL_DYNAMIC = FALSE
paper: export OMP_DYNAMIC = FALSE
paper: $(STAMP) ## Make Tables 1 and 2 and Figures 2 and 4 of the paper of RUN in results/ (paper/README.md)
	$(BIN)/python -m paper.table_1 "runs/$(RUN)" --data "$(DATA)" $(ARGS)
	$(BIN)/python -m paper.table_2 "runs/$(RUN)" --data "$(DATA)" $(ARGS)
	$(BIN)/python -m paper.figure_2 "runs/$(RUN)" $(ARGS)
	$(BIN)/python -m paper.figure_4 $(ARGS)

schedule-table: $(STAMP) ## Train every mask schedule of the paper, and write Table 3 and Figure 8: ARGS="--seeds 0"
	@$(BIN)/maskgit ablation --dataset "$(DATASET)" --data "$(DATA)" --cluster $(CLUSTER) --vary model.mask_schedule=exp,cubic,square,linear,sqrt,log \
		--num-steps 2,3,4,6,8,12,16,24 --model.decoding.guidance constant $(ARGS)
	@$(BIN)/python -m paper.table_3

demo: $(STAMP) ## Run everything: data, both stages, pictures and metrics; for your own images: DATASET=name IMAGES=folder
	@$(BIN)/maskgit demo $(OF_RUN) --cluster $(CLUSTER) $(if $(IMAGES),--images "$(IMAGES)") $(ARGS)

demo-short: $(STAMP) ## Run the demo from scratch with 60 steps per stage
	@rm -rf runs/demo-short
	@$(BIN)/maskgit demo --short --dataset "$(DATASET)" --data "$(DATA)" --recipe "$(strip $(RECIPE) $(BUDGET))" --cluster $(CLUSTER) $(if $(IMAGES),--images "$(IMAGES)") $(ARGS)

BENCHMARKS = $(filter-out measuring peers,$(basename $(notdir $(wildcard benchmarks/*.py))))

benchmark: $(STAMP) ## Run a benchmark against other implementations: NAME=stage2_step (benchmarks/README.md)
	@test -f benchmarks/$(NAME).py || { echo "benchmark $(NAME): no such file; NAME must be one of: $(BENCHMARKS)" >&2; exit 2; }
	@OMP_WAIT_POLICY=PASSIVE $(BIN)/python benchmarks/$(NAME).py $(ARGS)

benchmarks: $(STAMP) ## Run the benchmarks that compare, and write their ratios into benchmarks/README.md
	@$(BIN)/python $(INSTALL) --editable ".[benchmarks]"
	@OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python benchmarks/ratios.py $(ARGS)

benchmark-gpu: $(STAMP) ## Measure training and decoding on a GPU, and write results/gpu-CARD.md (docs/gpu.md)
	@$(BIN)/python benchmarks/gpu.py $(ARGS)

PYTEST = -m pytest --numprocesses $(WORKERS) --dist worksteal

test: $(DEV_STAMP) ## Run the tests (quick ones only: ARGS="-m 'not slow'")
	$(BIN)/python $(PYTEST) $(ARGS)

test-trainings: $(DEV_STAMP) ## Run the tests of commands, examples and pages that train
	$(BIN)/python $(PYTEST) -m trainings $(ARGS)

test-exports: $(DEV_STAMP) ## Run the tests of exports to ONNX and pt2, and of torch.compile
	$(BIN)/python $(PYTEST) -m exports $(ARGS)

test-survival: $(DEV_STAMP) ## Run the tests of faults, resumed runs and several ranks
	$(BIN)/python $(PYTEST) -m survival $(ARGS)

test-benchmarks: $(DEV_STAMP) ## Run the tests that run benchmarks
	$(BIN)/python $(PYTEST) -m benchmarks $(ARGS)

test-site: $(DEV_STAMP) ## Run the test that builds the documentation
	$(BIN)/python $(PYTEST) -m site $(ARGS)

# Old versions use what newer versions of their own dependencies deprecate.
OLD_WARNINGS = -W ignore::DeprecationWarning -W ignore::FutureWarning

test-lowest: $(LOWEST)/.installed ## Run the quick tests with the oldest versions of the dependencies (constraints/lowest.txt)
	$(LOWEST)/bin/python $(PYTEST) -m "not slow" $(OLD_WARNINGS) $(ARGS)

test-wheel: $(DEV_STAMP) ## Build the wheel, and run the quick start in an empty folder with nothing but it
	@$(BIN)/python -m pytest tests/wheel --durations=5 $(ARGS)

test-gpu: $(DEV_STAMP) ## Run the tests on a GPU; what needs a GPU, or two, is skipped without (docs/gpu.md)
	$(BIN)/python -m pytest tests/gpu --durations=5 $(ARGS)

CHROMIUM_INSTALL = $(AS_ROOT) apt-get -qq update && $(AS_ROOT) apt-get -qq install --yes --no-install-recommends chromium >/dev/null
CHROMIUM_MISSING = chromium must be installed, or CHROMIUM must name the program; on Debian, run this target as root or with sudo to install it

test-web: $(VENV)/.installed-test-web ## Run the tests of the page in a real Chromium (installs it with apt, as root or with sudo, if there is none)
	@test -n "$$CHROMIUM" || command -v chromium google-chrome >/dev/null || { $(CHROMIUM_INSTALL); } || { echo "$(CHROMIUM_MISSING)" >&2; exit 2; }
	@WEB_PICTURES="$(WEB_PICTURES)" $(BIN)/python -m pytest tests/web --durations=5 $(ARGS)

AS_ROOT = $(if $(filter 0,$(shell id -u)),,sudo --non-interactive)
SLURM_INSTALL = $(AS_ROOT) apt-get -qq update && $(AS_ROOT) apt-get -qq install --yes --no-install-recommends slurmctld slurmd slurm-client >/dev/null
SLURM_MISSING = Slurm must be installed (slurmctld, slurmd, slurm-client); on Debian or Ubuntu, run this target as root or with sudo to install it

test-slurm: $(DEV_STAMP) ## Run the tests on a real Slurm cluster on this machine (needs root or sudo; installs Slurm)
	@export PATH="$$PATH:/usr/sbin"; { command -v slurmctld && command -v slurmd && command -v scontrol; } >/dev/null || { $(SLURM_INSTALL); } || { echo "$(SLURM_MISSING)" >&2; exit 2; }
	@$(AS_ROOT) env PATH="$$PATH:/usr/sbin" OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest tests/slurm --durations=10 --durations-min=1 $(ARGS)

docs: $(DEV_STAMP) ## Build the documentation site in build/site; warnings and broken links are errors
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going --jobs auto --conf-dir docs . build/site $(ARGS)
	@echo "build/site/index.html: $$(find build/site -name '*.html' -not -path '*/_*' | wc -l) pages"

SPELLED = maskgit_pl tests docs recipes benchmarks paper data results constraints .ci Makefile pyproject.toml README.md CONTRIBUTING.md CHANGELOG.md SECURITY.md CODE_OF_CONDUCT.md RELEASING.md .github Dockerfile

CHECK_SCHEMA = $(BIN)/check-jsonschema --quiet --builtin-schema vendor

lint: $(DEV_STAMP) ## Check style, types, spelling, shell scripts and the files of CI
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell $(SPELLED)
	$(BIN)/hadolint Dockerfile
	$(CHECK_SCHEMA).github-workflows .github/workflows/*.yml
	$(CHECK_SCHEMA).github-issue-forms .github/ISSUE_TEMPLATE/bug.yml .github/ISSUE_TEMPLATE/idea.yml
	$(CHECK_SCHEMA).dependabot .github/dependabot.yml
	$(CHECK_SCHEMA).citation-file-format CITATION.cff
	$(BIN)/shellcheck recipes/slurm/train.sbatch tests/slurm/cluster.sh .ci/run docs/decoding/sheets.sh

format: $(DEV_STAMP) ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove the environments and caches; runs and data are kept
	rm -rf $(VENV) $(LOWEST) .mypy_cache .pytest_cache .ruff_cache build dist
