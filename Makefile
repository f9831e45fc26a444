# make demo: set up, then train on the built-in images and leave results and figures in results/demo/
# make test: set up, then run all tests
# The environment is .venv/; with VENV=path another one is used, with PYTHON=python3.12 another Python makes it.

PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
.DEFAULT_GOAL := help
.PHONY: help setup demo smoke test lint format bench clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.complete  ## make the environment (about 5 GB: PyTorch with CUDA)

$(VENV)/.complete: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet -r requirements-dev.txt
	@touch $@

DEMO := results_dir=results/demo dataset=synthetic network_width=8 num_tasks=4 epochs_per_task=10 train_images_per_class=180
demo: setup  ## continual backpropagation on the built-in images, offline, about two minutes
	$(PY) incremental_cifar_experiment.py --config cfg/continual_backpropagation.json --set $(DEMO) replacement_rate=1e-4 maturity_threshold=100

SMOKE := results_dir=results/smoke dataset=synthetic network_width=2 num_tasks=2 epochs_per_task=2 train_images_per_class=18
smoke: setup  ## the demo in its smallest form, seconds
	$(PY) incremental_cifar_experiment.py --config cfg/continual_backpropagation.json --verbose --set $(SMOKE)

test: setup  ## all tests
	$(PY) -m pytest

lint: setup  ## Ruff's checks, and that the formatting is Ruff's
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: setup  ## format the code with Ruff
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: setup  ## time a training step beside a bare loop
	$(PY) bench.py

clean:  ## remove the results of demo and smoke, and caches
	rm -rf results/demo results/smoke .pytest_cache .ruff_cache .hypothesis
