# make demo: set up, then train and analyse on built-in images; the figures are in results/demo/figures/
# make test: set up, then run all tests
# The environment is .venv/, made by PYTHON (python3); with VENV=path an environment of yours is used as it is. Another PyTorch than that of
# requirements.txt: make setup TORCH=2.14.1 TORCHVISION=0.29.1

PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
.DEFAULT_GOAL := help
.PHONY: help setup demo smoke test effect stress lint format docs bench clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(if $(filter .venv,$(VENV)),.venv/.complete)  ## make the environment (about 5 GB: PyTorch with CUDA)

.venv/.complete: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip
	@sed $(if $(TORCH),-e 's/^torch==.*/torch==$(TORCH)/') -e '$(if $(TORCHVISION),s/^torchvision==.*/torchvision==$(TORCHVISION)/)' \
		requirements.txt > $(VENV)/requirements.txt
	@cp requirements-dev.txt $(VENV)
	$(PY) -m pip install --quiet -r $(VENV)/requirements-dev.txt
	@touch $@

# Loss of plasticity in miniature: 6 tasks of 2 classes, 20 epochs each, 60 built-in images per class, a network of an eighth of the width;
# weight decay is 40 times the paper's and units are reset more often, because steps are few (docs/small_scale.md). A run per core, with
# one thread: so narrow a network gains nothing from a second one.
DEMO := dataset=synthetic device=cpu network_width=8 batch_size=30 num_tasks=6 classes_per_task=2 epochs_per_task=20 train_images_per_class=60 \
	validation_images_per_class=10 test_images_per_class=20 weight_decay=0.02 replacement_rate=3e-3 maturity_threshold=30
DEMO_ALGORITHMS := base_deep_learning_system continual_backpropagation retrained_network
demo: OUT := results/demo
demo: setup  ## three algorithms, two runs each, on built-in images, to the figures: offline, about five minutes
	OMP_NUM_THREADS=1 $(PY) run_sweep.py --configs $(DEMO_ALGORITHMS:%=cfg/%.json) --indices 0-1 --set results_dir=$(OUT) $(DEMO) --analyse

SMOKE := dataset=synthetic network_width=2 num_tasks=2 epochs_per_task=2 train_images_per_class=18
smoke: OUT := results/smoke
smoke: setup  ## the demo in its smallest form: one run to one figure, seconds
	$(PY) incremental_cifar_experiment.py --config cfg/continual_backpropagation.json --verbose --set results_dir=$(OUT) $(SMOKE)
	$(PY) post_run_analysis.py --results_dir $(OUT)/continual_backpropagation
	$(PY) plots/plot_incremental_cifar_results.py --results_dir $(OUT) --metric next_task_dormant_units_analysis --output $(OUT)/dormant_units.png

test: setup  ## all tests, two files at a time; first the one that waits for Slurm
	$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder tests/test_sweep_slurm.py tests

effect: setup  ## that the demo's settings show loss of plasticity: two runs, two minutes
	STRESS=1 $(PY) -m pytest -q tests/test_demo.py

stress: setup  ## crash safety many times over, all of the numeric grid, torch.compile, Slurm's limits; a table of counts; about half an hour
	STRESS=1 $(PY) -m pytest -q tests/test_crash_safety.py tests/test_cuda_graphs.py tests/test_numerics.py tests/test_sweep_slurm.py

lint: setup  ## Ruff's checks, and that the formatting is Ruff's
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: setup  ## format the code with Ruff
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

docs: setup  ## write the table of keys in cfg/README.md
	$(PY) -m incremental_cifar.explain

bench: setup  ## time a training step beside a bare loop
	$(PY) bench.py

clean:  ## remove the results of demo and smoke, and caches
	rm -rf results/demo results/smoke .pytest_cache .ruff_cache .hypothesis
