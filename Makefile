PYTHON ?= python3.11
BIN := .venv/bin
READY := .venv/.ready
OUT := outputs/reproduce

.DEFAULT_GOAL := help
.PHONY: help setup reproduce results report test test-slow lint format benchmark benchmark-gpu

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "%-16s %s\n", $$1, $$2}'

setup: $(READY) ## make the environment in .venv (PYTHON=python3.11)

$(READY): requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $(READY)

reproduce: $(READY) ## prune SmolLM2 by four methods, evaluate, and leave a table and a figure in outputs/reproduce
	@# a finished sweep is made again from nothing; an interrupted one goes on where it stopped
	@if [ -e $(OUT)/finished ]; then rm -r $(OUT); fi
	$(BIN)/python -m experiments.prune --multirun experiment=reproduce results_dir=$(OUT)/runs
	$(BIN)/python -m experiments.report records=$(OUT)/runs output=$(OUT) reference=results/runs
	@touch $(OUT)/finished

results: $(READY) ## the same into results/, whose records are committed; those that exist are skipped
	$(BIN)/python -m experiments.prune --multirun experiment=reproduce results_dir=results/runs
	$(MAKE) --no-print-directory report

report: $(READY) ## rebuild the tables and the figure of results/ from its records
	$(BIN)/python -m experiments.report

test: $(READY) ## the tests
	$(BIN)/python -m pytest -m "not slow" --nbmake tests notebooks

test-slow: $(READY) ## all tests, with those that take minutes and download more
	$(BIN)/python -m pytest --nbmake tests notebooks

lint: $(READY) ## ruff (check and format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy dass experiments

format: $(READY) ## let ruff mend and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

benchmark: $(READY) ## ratios to the forward work and to the reference's walk, into results/benchmark.md
	$(BIN)/python -m experiments.benchmark

benchmark-gpu: $(READY) ## the same on a GPU with a random model of LLaMA2-7B's shape, into results/benchmark_gpu.md
	$(BIN)/python -m experiments.benchmark --gpu
