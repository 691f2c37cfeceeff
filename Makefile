# make demo    the whole job on a laptop: tokenizer, pretraining in phases, instruction tuning, evaluation
# make test    style, types and tests in about ten minutes; a test that cannot run here skips and says why
# make test-long       the longest runs: many kills, every backend, the planner against real steps
# make test-cluster    a SageMaker job as it is described, on two hosts in network namespaces (root, Linux; minutes)
# make test-compatibility   what comes out, opened by transformers 4.57 and llama.cpp in an environment of their own (builds llama.cpp)
# make test-floor      whole runs and the planner with the oldest versions (constraints-floor.txt, torch 2.9.1) in an environment of their own
#   make test-floor FLOOR_TORCH=2.11.0 FLOOR_PYTHON=python3.12 runs them with another torch or Python
# make test-sagemaker-image   the same with what a job installs in AWS' Hugging Face image: torch 2.9.0, sagemaker/constraints.txt, Python 3.12
# make test-all        all of these but those that make environments
# make setup   only the environment (.venv); all of the above do it first
# make lock    requirements.lock anew, after a change of constraints.txt or pyproject.toml (needs uv)
# A machine without a GPU can save the download of CUDA's libraries:
#   make setup PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"

# pip compiles none of the 20,000 files that it installs: what is imported is compiled then, once
unexport PYTHONDONTWRITEBYTECODE

PYTHON ?= python3
PIP_ARGS ?=
READY := .venv/.ready
LLAMA_CPP_PYTHON := 0.3.36
FLOOR_TORCH ?= 2.9.1
FLOOR_PYTHON ?= $(PYTHON)
FLOOR_PINS ?= constraints-floor.txt
FLOOR := .venv-floor-$(FLOOR_TORCH)
FLOOR_TESTS := tests/run/test_pipeline.py tests/run/test_packing.py tests/run/test_plan.py tests/run/test_foreseen.py tests/unit/planning \
  tests/unit/training tests/unit/modeling/test_attention.py tests/unit/modeling/test_parameter_groups.py \
  tests/run/test_backends.py tests/run/test_tuning.py tests/run/test_evaluate.py

.PHONY: setup lock demo lint test test-long test-cluster test-compatibility test-floor test-sagemaker-image test-all clean
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

# The converter lies in the source package only; its first line names the Python that has its packages
.venv-compatibility/.ready: tests/compatibility.txt
	@echo "==> setting up .venv-compatibility (compiles llama.cpp: 10 to 30 minutes on two cores)"
	@rm -rf .venv-compatibility && $(PYTHON) -m venv .venv-compatibility
	@.venv-compatibility/bin/pip install --quiet $(PIP_ARGS) -r tests/compatibility.txt
	@.venv-compatibility/bin/pip download --quiet --no-deps --no-binary llama-cpp-python --dest .venv-compatibility llama-cpp-python==$(LLAMA_CPP_PYTHON)
	@CMAKE_ARGS="-DLLAVA_BUILD=OFF $(CMAKE_ARGS)" .venv-compatibility/bin/pip install --quiet .venv-compatibility/llama_cpp_python-$(LLAMA_CPP_PYTHON).tar.gz
	@tar -xzf .venv-compatibility/llama_cpp_python-$(LLAMA_CPP_PYTHON).tar.gz -C .venv-compatibility --strip-components=2 llama_cpp_python-$(LLAMA_CPP_PYTHON)/vendor/llama.cpp
	@sed -i '1s|.*|#!$(CURDIR)/.venv-compatibility/bin/python|' .venv-compatibility/llama.cpp/convert_hf_to_gguf.py
	@touch $@

test-compatibility: $(READY) .venv-compatibility/.ready
	@echo "==> pytest, other programs open what comes out"
	@$(PYTEST) tests/test_compatibility.py

$(FLOOR)/.ready: $(FLOOR_PINS) pyproject.toml
	@echo "==> setting up $(FLOOR)"
	@rm -rf $(FLOOR) && $(FLOOR_PYTHON) -m venv $(FLOOR)
	@$(FLOOR)/bin/pip install --quiet $(PIP_ARGS) --constraint $(FLOOR_PINS) torch==$(FLOOR_TORCH) \
	  --editable '.[evaluation,harness]' pytest pytest-xdist hypothesis tiktoken
	@touch $@

# What needs an extra that is not installed here, or a newer torch, skips and says so
test-floor: $(FLOOR)/.ready
	@echo "==> pytest with torch $(FLOOR_TORCH)"
	@$(FLOOR)/bin/python -m pytest -q $(IN_TWO) -m "not long and not cluster" $(FLOOR_TESTS)

test-sagemaker-image:
	@$(MAKE) --no-print-directory test-floor FLOOR=.venv-sagemaker-image FLOOR_TORCH=2.9.0 FLOOR_PYTHON=python3.12 FLOOR_PINS=sagemaker/constraints.txt

test-all:
	@status=0; for target in test test-long test-cluster; do $(MAKE) --no-print-directory $$target || status=1; done; exit $$status

clean:
	rm -rf .venv .venv-* runs dist build
