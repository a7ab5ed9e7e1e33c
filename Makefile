# Every target sets up what it needs. The commands below are the ones the README names and CI runs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LINKS := build/links/weft
GENERATOR := build/proto-venv/generator.txt

.PHONY: demo test test-slow check bench gpu-check gpu-bench proto methods format clean
.DEFAULT_GOAL := demo

$(VENV)/ready: pyproject.toml constraints.txt
	@echo "setting up $(VENV) (a few minutes the first time)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt torch
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

# mapped packages are invisible to type checkers (and to machines without pip): a directory of links is not
$(LINKS): Makefile
	@mkdir -p $(LINKS)
	@for room in proto kernels adapters_store server bench; do ln -sfn ../../../$$room $(LINKS)/$$room; done
	@ln -sfn ../../../server/client $(LINKS)/client
	@touch $(LINKS)

demo: $(VENV)/ready
	@$(BIN)/weft demo

# tests of running servers watch the clock: apart from those that compute, and never more than two at a time
SERVERS := tests/e2e tests/server/doors tests/client
# what `make check` runs
RULES := tests/test_house.py tests/test_stubs.py
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not slow and not gpu" --dist loadfile

test: $(VENV)/ready $(LINKS)
	@$(PYTEST) -n auto $(SERVERS:%=--ignore=%) $(RULES:%=--ignore=%)
	@$(PYTEST) -n 2 $(SERVERS)

test-slow: $(VENV)/ready $(LINKS)
	@$(BIN)/python -m pytest -m "slow and not gpu" --timeout 1800

check: $(VENV)/ready $(LINKS) $(GENERATOR)
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy build/links/weft tests
	@$(BIN)/python -m pytest -q $(RULES)

bench: $(VENV)/ready
	@$(BIN)/weft bench decode --peer peft

gpu-check: $(LINKS)
	@PYTHONPATH=build/links $(PYTHON) -m weft.bench.gpu_check

gpu-bench: $(LINKS)
	@PYTHONPATH=build/links $(PYTHON) -m weft.bench.gpu_bench

# what makes the stubs has an environment of its own
$(GENERATOR): $(VENV)/ready proto/generate.py
	@$(BIN)/python proto/generate.py --set-up
	@touch $@

proto: $(GENERATOR)
	@$(BIN)/python proto/generate.py

methods: $(VENV)/ready
	@$(BIN)/weft methods --markdown README.md

format: $(VENV)/ready
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

clean:
	@rm -rf $(VENV) build dist
