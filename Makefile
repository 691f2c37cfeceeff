# make demo    the whole job on a laptop: tokenizer, pretraining in phases, instruction tuning, evaluation
# make test    style, types and tests in about ten minutes; a test that cannot run here skips and says why
# make test-long       the longest runs: many kills, every backend, the planner against real steps
# make test-cluster    a SageMaker job as it is described, on two hosts in network namespaces (root, Linux; minutes)
# make test-all        all of these
# make setup   only the environment (.venv); all of the above do it first
# make lock    requirements.lock anew, after a change of constraints.txt or pyproject.toml (needs uv)
# A machine without a GPU can save the download of CUDA's libraries:
#   make setup PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"

# pip compiles none of the 20,000 files that it installs: what is imported is compiled then, once
unexport PYTHONDONTWRITEBYTECODE

PYTHON ?= python3
PIP_ARGS ?=
READY := .venv/.ready

.PHONY: setup lock demo lint test test-long test-cluster test-all clean
.DEFAULT_GOAL := demo

setup: $(READY)

$(READY): pyproject.toml constraints.txt requirements.lock
	@echo "==> setting up .venv (a few minutes the first time, most of it downloads)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "azrecipe needs Python 3.11 or newer: make setup PYTHON=python3.11")'
	@test -x .venv/bin/python || $(PYTHON) -m venv .venv
	@.venv/bin/python tools/install_environment.py $(PIP_ARGS)
	@touch $(READY)
	@echo "==> .venv is ready"

# A build of torch for CPUs needs no CUDA libraries, and one for GPUs names them exactly: the lock leaves them out
lock:
	@{ echo "# Written by make lock from pyproject.toml and constraints.txt; change those, not this file. CUDA's libraries are left out."; \
	  uv pip compile --quiet --universal --python-version 3.11 --extra dev --constraint constraints.txt --no-annotate --no-header \
	    pyproject.toml | grep -v -E '^(cuda|nvidia)-'; } > requirements.lock.new || { rm requirements.lock.new; exit 1; }
	@mv requirements.lock.new requirements.lock

demo: $(READY)
	@echo "==> the whole job on a very small model: runs/quickstart"
	@.venv/bin/azrecipe run recipes/quickstart/pipeline.yaml

lint: $(READY)
	@echo "==> ruff and mypy"
	@.venv/bin/ruff check azrecipe tests benchmarks tools
	@.venv/bin/ruff format --check azrecipe tests benchmarks tools
	@.venv/bin/mypy
	@.venv/bin/mypy tools/install_environment.py

PYTEST := .venv/bin/python -m pytest -q
IN_TWO := --numprocesses 2 --dist loadfile --no-loadscope-reorder

test: lint
	@echo "==> pytest"
	@$(PYTEST) $(IN_TWO) -m "not long and not cluster"

test-long: $(READY)
	@echo "==> pytest, the long tests"
	@$(PYTEST) $(IN_TWO) -m long

test-cluster: $(READY)
	@echo "==> pytest, two hosts"
	@$(PYTEST) -m cluster tests/cluster

test-all:
	@status=0; for target in test test-long test-cluster; do $(MAKE) --no-print-directory $$target || status=1; done; exit $$status

clean:
	rm -rf .venv runs dist build
