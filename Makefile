# `make setup` installs, `make demo` shows the main job, `make test` proves it, `make check` reads it, `make bench` times it.
PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
ARGS   ?=
# Most tests wait for processes: three at a time keep two cores busy. Tests of a file stay together, as they share
# services; tests/conftest.py says which files come first. (Groups of pytest-xdist 3.8 do nothing beside pytest 9.2.)
TESTS  ?= -n 3 --dist loadfile --no-loadscope-reorder
# Written bytecode saves each of the tests' many processes from compiling this repository again.
test test-all fuzz campaign: export PYTHONDONTWRITEBYTECODE =

.PHONY: setup demo phenomena test test-all fuzz campaign bench cuda check format types wheels lock clean
.DEFAULT_GOAL := setup

setup: $(STAMP)

$(STAMP): pyproject.toml server/pyproject.toml requirements.lock requirements-vision.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --no-deps -r requirements-vision.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e . -e ./server
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

# Workers that are killed, stopped and cut off, and restarts of PostgreSQL, whole: hours. docs/reliability.md.
campaign: export CAMPAIGN_SCALE ?= 1
campaign: setup
	$(BIN)/python -m pytest tests/reliability $(ARGS)

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
	$(BIN)/mypy --python-version 3.14 --package interplay
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# After a change of what the service answers, or of the definitions: writes interplay/results.py, docs/gate.schema.json
# and the copy of the definitions that the server's package brings along.
types: setup
	cp docs/metrics.md app/pages/metrics.md
	$(BIN)/python -m tools.result_types
	$(BIN)/python -m tools.gate_schema

# What a machine without this repository installs (README.md): one file of each package, in dist/.
wheels: setup
	rm -rf dist
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir dist \
	  . ./server
	ls dist

# After a change of ranges or of the group dev: installs all of it into an empty environment and writes down what came.
# What the lock has stays at its version, unless LOCKED says otherwise: `make lock LOCKED=` takes the newest of all.
# A local label (torch's +cpu) names one index's build and is left out, so that the lock installs from any.
LOCKED ?= --constraint requirements.lock
lock:
	rm -rf .venv-lock
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'
	.venv-lock/bin/python -m pip install --quiet --disable-pip-version-check $(LOCKED) --group dev \
	  -e '.[export,mlflow,train]' -e './server[traces,transformers]'
	(echo '# Every package of `make setup`, pinned. Made by `make lock`; change pyproject.toml or server/pyproject.toml.'; \
	 .venv-lock/bin/python -m pip freeze --exclude-editable | sed -E 's/\+[a-z0-9.]+$$//') > .venv-lock/requirements.lock
	mv .venv-lock/requirements.lock requirements.lock
	rm -rf .venv-lock

clean:
	rm -rf $(VENV) .venv-lock dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
