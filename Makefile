PYTHON ?= python3.11
BIN := .venv/bin
READY := .venv/.ready
OUT := outputs/reproduce
SCALE := small
CUDA := ^(\#|nvidia|cuda|triton|setuptools)
EXPERIMENTS := table1 table-glu-variants table-no-glu table-activations table-experts table-zero-shot ablation-alpha \
	ablation-granularity ablation-calibration ablation-update ablation-order sparsity-curve pruning-time diagnostics

.DEFAULT_GOAL := help
.PHONY: help setup setup-slurm setup-ray pins reproduce $(EXPERIMENTS) table-scale table-repair table-hardware stability experiments tables site train-tiny test \
	test-slow lint format benchmark benchmark-memory benchmark-scaling benchmark-speed benchmark-gpu

help: ## list the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "%-21s %s\n", $$1, $$2}'

setup: $(READY) ## make the environment in .venv (PYTHON=python3.11)

$(READY): requirements.txt constraints.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $(READY)

setup-slurm: $(READY) ## add what hydra/launcher=slurm needs
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'submitit>=1.5'

setup-ray: $(READY) ## add what hydra/launcher=ray needs
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'ray>=2.50'

pins: ## pin what pyproject.toml asks for, with uv; what is pinned stays, unless UPGRADE=--upgrade
	uv pip compile --quiet --universal --python-version 3.11 --no-annotate --extra dev --extra slurm --extra finetune \
		$(UPGRADE) --output-file constraints.txt pyproject.toml
	@{ echo '# Made by `make pins`: what pyproject.toml asks for with its extras dev, slurm and finetune, without what only a'; \
		echo '# CUDA build of torch brings; that is pinned by constraints.txt, and so asked for by nobody on a CPU.'; \
		echo '--constraint constraints.txt'; grep -vE '$(CUDA)' constraints.txt; } > requirements.txt

reproduce: $(READY) ## prune SmolLM2 by four methods, evaluate, and leave a table and a figure in outputs/reproduce
	@# a finished sweep is made again from nothing; an interrupted one goes on where it stopped
	@if [ -e $(OUT)/finished ]; then rm -r $(OUT); fi
	$(BIN)/python -m experiments.prune --multirun experiment=reproduce results_dir=$(OUT)/runs
	$(BIN)/python -m experiments.report records=$(OUT)/runs output=$(OUT) reference=results/runs
	@touch $(OUT)/finished

# Each of these runs what has no record yet, and rebuilds the experiment's tables and figure, also where runs failed.
table1: ## perplexity: models x methods x patterns (SCALE=small or paper, here and below)
table-glu-variants: $(if $(filter small,$(SCALE)),train-tiny) ## SwiGLU, GeGLU and ReGLU
table-no-glu: $(if $(filter small,$(SCALE)),train-tiny) ## with a gate and without one
table-activations: $(if $(filter small,$(SCALE)),train-tiny) ## activation functions, and what goes with DaSS's lead
table-experts: $(if $(filter small,$(SCALE)),train-tiny) ## experts, one by one
table-zero-shot: ## zero-shot accuracy
ablation-alpha: ## DaSS's exponent
ablation-granularity: ## comparison groups within output rows or input columns
ablation-calibration: ## number, draw and source of calibration sequences
ablation-update: ## masks without and with SparseGPT's update
sparsity-curve: ## perplexity over sparsity
pruning-time: ## seconds and memory of each method; on an idle machine
diagnostics: ## errors, overlap of masks and spread of norms, block by block

ablation-order: ## the order of the neurons: released, random, spread, matched
table-scale: ## the methods over models of 135 million to 1.5 billion parameters; long, and not one of `experiments`
table-hardware: ## what it costs to comply with sparse tensor cores; long, too

table-repair: ## masks without and with each repair: what is left of the differences between criteria; long, too

stability: ## whether the chosen weights stay the right ones when training goes on; long, too

$(EXPERIMENTS) table-scale table-repair table-hardware stability: $(READY)
	@status=0; experiment=$(if $(filter table1,$@),table1_perplexity,$(subst -,_,$@)); \
	$(BIN)/python -m experiments.prune --multirun experiment=$$experiment scale=$(SCALE) || status=$$?; \
	$(BIN)/python -m experiments.report experiment=$$experiment scale=$(SCALE) log_to=wandb || status=$$?; \
	exit $$status

experiments: $(READY) ## all of them
	$(MAKE) --no-print-directory --keep-going $(EXPERIMENTS)

tables: $(READY) ## rebuild all tables and figures of results/ and docs/reproduction.md from the records, without a model
	$(BIN)/python -m experiments.report experiment=all scale=$(SCALE)
	$(BIN)/python -m experiments.report page=docs/reproduction.template.md
	$(BIN)/python -m report.axes

site: $(READY) ## all tables, figures and records as one page for a browser, outputs/site/index.html
	$(BIN)/python -m experiments.report site=outputs/site

train-tiny: $(READY) ## train the small models that table-no-glu and others compare, where they are not there; 3 hours
	@# two processes of one thread each share the work, which two cores do faster than one process on both
	@OMP_NUM_THREADS=1 $(BIN)/python -m experiments.train_tiny & \
	OMP_NUM_THREADS=1 $(BIN)/python -m experiments.train_tiny; status=$$?; wait $$! && exit $$status

test: $(READY) ## the tests, in two processes of one thread each
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n 2 --nbmake tests notebooks

test-slow: $(READY) ## all tests, with those that take minutes and download more
	$(BIN)/python -m pytest --nbmake tests notebooks

lint: $(READY) ## ruff (check and format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy dass report experiments benchmarks hydra_plugins

format: $(READY) ## let ruff mend and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

benchmark: $(READY) ## ratios to the forward work and to the reference's walk, into results/benchmark.md
	$(BIN)/python -m benchmarks.walk

benchmark-memory: $(READY) ## peak memory of models that are streamed from disk, into results/benchmark_memory.md
	$(BIN)/python -m benchmarks.memory

benchmark-scaling: $(READY) ## the streamed walk over width, depth and tokens beside the plan, results/benchmark_scaling.md
	$(BIN)/python -m benchmarks.scaling

benchmark-speed: $(READY) ## dense against 2:4 products on a GPU, into results/benchmark_speed.md
	$(BIN)/python -m benchmarks.speed

benchmark-gpu: $(READY) ## the same on a GPU with a random model of LLaMA2-7B's shape, into results/benchmark_gpu.md
	$(BIN)/python -m benchmarks.walk --gpu
