# `make setup` installs, `make demo` shows the main job, `make test` proves it, `make check` reads it, `make bench` times it.
PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
ARGS   ?=
# Most tests wait for processes: three at a time keep two cores busy. A file's tests stay together, as they share services;
# files come in the order of tests/conftest.py, the longest first.
TESTS  ?= -n 3 --dist loadfile --no-loadscope-reorder

.PHONY: setup demo phenomena test test-all fuzz bench cuda check format types lock clean
.DEFAULT_GOAL := setup

setup: $(STAMP)

$(STAMP): pyproject.toml requirements.lock requirements-vision.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-vision.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

demo: setup
	$(BIN)/python -m examples.digits $(ARGS)

# The paper's six phenomena, about ten minutes; docs/phenomena.md has what was seen.
phenomena: setup
	for example in dynamics connectivity smoothing pruning grokking semisupervised; do \
	  $(BIN)/python -m examples.$$example --output docs/phenomena || exit; done

test: setup
	$(BIN)/python -m pytest $(TESTS) $(ARGS)

# The campaigns of minutes as well, which are marked slow.
test-all: setup
	$(BIN)/python -m pytest $(TESTS) -m "slow or not slow" $(ARGS)

# Damaged files and schemathesis, for as long as you like; .ci/run gives them two minutes. ARGS: --seed 7 --seconds 3600.
fuzz: setup
	$(BIN)/python -m tests.fuzz $(or $(ARGS),--seconds 1800)

# Never part of the tests. ARGS: --device cuda, --threads 2, --output FILE.
bench: setup
	$(BIN)/python -m benchmarks $(ARGS)

# What a GPU changes: tests/cuda and rows of the benchmarks, one table. On a machine with a GPU and its image's own
# packages, without `make setup`: make cuda CUDA_PYTHON=python3. ARGS: --only tests paths, --output FILE.
DEVICE ?= cuda
CUDA_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,python3)
cuda:
	$(CUDA_PYTHON) -m benchmarks.cuda --device $(DEVICE) $(ARGS)

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# After a change of what the service answers: writes interplay/results.py and docs/gate.schema.json anew.
types: setup
	$(BIN)/python -m tools.result_types
	$(BIN)/python -m tools.gate_schema

# After a change of pins in pyproject.toml: installs them into an empty environment and writes down all that came.
# A local label (torch's +cpu) names one index's build and is left out, so that the lock installs from any.
lock:
	rm -rf .venv-lock
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	(echo '# Every package of `make setup`, pinned. Made by `make lock`; change pyproject.toml instead.'; \
	 .venv-lock/bin/python -m pip freeze --exclude-editable | sed -E 's/\+[a-z0-9.]+$$//') > requirements.lock
	rm -rf .venv-lock

clean:
	rm -rf $(VENV) .venv-lock .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
