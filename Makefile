# make serve   serve a real model with the packed KV cache, ask it one question, keep serving
# make quality write quality.md: what each preset costs MODEL, beside bf16 and fp8
# make test    run the package's tests   make test-benchmarks   those of benchmarks/ and scripts/
# make lint    ruff and mypy (make types alone)            make docs    tables and pictures of the pages, from the records
# make clean   remove what make made here
#
# PYTHON=python3.12  interpreter for .venv (3.11 or newer)
# VENV=FOLDER        use this environment as it is: nothing is installed into it
# MODEL=NAME         SmolLM2-135M-Instruct (default), qwen2.5-coder-0.5b or qwen2.5-coder-1.5b, made in the cache folder;
#                    a folder, or a hub's OWNER/MODEL
# ARGS="--..."       more arguments for sglang.launch_server, or for pytest
# ONCE=1             stop serving after the answer

PYTHON ?= python3
SHELL := /bin/bash

ifeq ($(origin VENV),undefined)
VENV := .venv
INSTALLED := $(VENV)/.installed
else
INSTALLED :=
endif
BIN := $(VENV)/bin

# Python would put the clone's root on sys.path, where kernels/ is not the package that SGLang imports.
export PYTHONSAFEPATH := 1
# Spinning OpenMP threads make small tensor operations on busy cores a hundred times slower.
export OMP_WAIT_POLICY ?= PASSIVE
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: serve quality test test-benchmarks lint types docs clean

serve: $(INSTALLED)
	@set -e; model=$$($(BIN)/python scripts/get_model.py $(if $(MODEL),'$(MODEL)')); \
	exec $(BIN)/python scripts/serve.py --model-path "$$model" $(if $(filter-out 0,$(ONCE)),--once) -- $(ARGS)

quality: $(INSTALLED)
	@set -e; model=$$($(BIN)/python scripts/get_model.py $(if $(MODEL),'$(MODEL)')); \
	PYTHONPATH='$(CURDIR)' exec $(BIN)/python -m benchmarks.fidelity card --model-path "$$model" --out quality.md $(ARGS)

test: $(INSTALLED)
	@set -e; SMOLLM2=$$($(BIN)/python scripts/get_model.py); export SMOLLM2; \
	exec $(BIN)/python -m pytest --ignore=tests/benchmarks -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-benchmarks: $(INSTALLED)
	@set -e; SMOLLM2=$$($(BIN)/python scripts/get_model.py); export SMOLLM2; \
	$(BIN)/python scripts/get_model.py qwen2.5-coder-0.5b > /dev/null || echo 'its test will be skipped' >&2; \
	exec $(BIN)/python -m pytest tests/benchmarks $(ARGS)

lint: $(INSTALLED)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	@$(MAKE) --no-print-directory types

# mypy finds modules as imports name them: in a folder where kernels/ and calibrate/ lie in the package, as installed.
types: $(INSTALLED)
	@rm -rf build/types && mkdir -p build/types/sglang_blockgtq
	@ln -s '$(CURDIR)'/sglang_blockgtq/*[!_] '$(CURDIR)'/{kernels,calibrate} build/types/sglang_blockgtq
	cd build/types && $(abspath $(BIN))/python -m mypy --config-file '$(CURDIR)/pyproject.toml' --cache-dir '$(CURDIR)/.mypy_cache'

# What tests/test_docs.py compares with benchmarks/results and with the code.
docs: $(INSTALLED)
	$(BIN)/python scripts/results_table.py
	$(BIN)/python scripts/format_table.py
	$(BIN)/python scripts/draw_row.py
	$(BIN)/python scripts/draw_figures.py
	PYTHONPATH='$(CURDIR)' $(BIN)/python -m benchmarks.compatibility --write-docs

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +

# Made again when the dependencies change; the code itself is installed editable.
.venv/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	{ echo '$(PYTHON) is older than Python 3.11: install a newer one and name it with PYTHON=' >&2; exit 1; }
	@echo 'installing SGLang and its dependencies into .venv: several GB, 3 to 15 minutes'
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -e '.[test,demo]'
	@touch $@
