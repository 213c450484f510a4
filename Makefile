# The doors: setup, demo, test, lint, docs, bench. Everything happens in .venv; nothing is installed outside it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO := demo-output
WORKERS ?= 2

.PHONY: setup demo test test-all test-lowest test-newest audit faults soak lint docs bench bench-gpu fuzz clean

setup: $(READY)

$(READY): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null || \
	    { echo "make setup needs Python 3.10 to 3.13 with venv, and $(PYTHON) is not one: name another, as in make setup PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,heal,report]'
	touch $(READY)

demo: setup
	@SGLP_BIN=$(BIN) OUTPUT=$(DEMO) bash tools/demo.sh

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -m 'not slow'

# What CI runs: the tests on the real model too.
test-all: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -m 'not slow'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m slow

# The lowest versions that setup.cfg allows (constraints-lowest.txt), and the newest that the index has.
test-lowest test-newest: test-%:
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager \
	    $(if $(filter lowest,$*),--constraint constraints-lowest.txt) --editable '.[dev,heal,report]'
	OMP_NUM_THREADS=1 .venv-$*/bin/python -m pytest -n $(WORKERS) -m 'not slow'

# Known vulnerabilities of the pinned versions, licences of what is installed; the wheel and the sdist as an index would take them.
audit: setup
	$(BIN)/python -m venv .venv-audit
	.venv-audit/bin/python -m pip install --quiet --upgrade build twine pip-audit pip-licenses
	.venv-audit/bin/python tools/audit.py $(BIN)/python

# A signal at every moment of every command that writes, and disks that are full at every stage; about an hour.
faults: setup
	FAULTS=every OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/faults

# 300 models pruned, exported and reloaded in one process; memory and open files must stay flat.
soak: setup
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/soak.py --cycles 300

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The site, in site/; --strict: a warning is a failure.
docs: setup
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

bench: setup
	$(BIN)/python benchmarks/export.py
	$(BIN)/python benchmarks/analysis.py
	$(BIN)/python benchmarks/criteria.py
	$(BIN)/python benchmarks/gradnorm.py
	$(BIN)/python benchmarks/streamed.py
	$(BIN)/python benchmarks/trials.py
	$(BIN)/python benchmarks/search.py
	$(BIN)/python benchmarks/healing.py
	$(BIN)/python benchmarks/trial_dtype.py

# On one GPU with 40 GB or more; 16 GB of disk for a random model. With the Python that has torch for the GPU.
bench-gpu:
	PYTHONPATH=. python3 benchmarks/gpu.py

# Hostile files and options: make test tries 500 of them, the same ones each time.
fuzz: setup
	SGLP_FUZZ_INPUTS=20000 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/hostile -n $(WORKERS)

clean:
	rm -rf $(VENV) .venv-lowest .venv-newest .venv-audit $(DEMO) site build dist *.egg-info
