# make demo    the whole job on a laptop: tokenizer, pretraining in phases, instruction tuning, evaluation
# make test    style, types and tests
# make test-cluster    a SageMaker job as it is described, on two hosts in network namespaces (root, Linux; minutes)
# make setup   only the environment (.venv); both of the above do it first
# A machine without a GPU can save the download of CUDA's libraries:
#   make setup PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"

# pip compiles none of the 20,000 files that it installs: what is imported is compiled then, once
unexport PYTHONDONTWRITEBYTECODE

PYTHON ?= python3
PIP_ARGS ?=
READY := .venv/.ready

.PHONY: setup demo test test-cluster lint clean
.DEFAULT_GOAL := demo

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@echo "==> setting up .venv (a few minutes the first time, most of it downloads)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "azrecipe needs Python 3.11 or newer: make setup PYTHON=python3.11")'
	@test -x .venv/bin/python || $(PYTHON) -m venv .venv
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt $(PIP_ARGS) --editable ".[dev]"
	@touch $(READY)
	@echo "==> .venv is ready"

demo: $(READY)
	@echo "==> the whole job on a very small model: runs/quickstart"
	@.venv/bin/azrecipe run recipes/quickstart/pipeline.yaml

lint: $(READY)
	@echo "==> ruff and mypy"
	@.venv/bin/ruff check azrecipe tests benchmarks
	@.venv/bin/ruff format --check azrecipe tests benchmarks
	@.venv/bin/mypy

test: lint
	@echo "==> pytest"
	@.venv/bin/python -m pytest -q --numprocesses 2 --dist loadfile --no-loadscope-reorder

test-cluster: $(READY)
	@echo "==> pytest, two hosts"
	@AZRECIPE_CLUSTER=1 .venv/bin/python -m pytest -q -rs tests/cluster

clean:
	rm -rf .venv runs dist build
