PYTHON ?= python3
PY := .venv/bin/python

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-oldest test-gpu lint bench

help:  ## show this list
	@grep -hE '^[a-z-]+:.*## ' Makefile | awk -F ':.*## ' '{printf "  make %-11s %s\n", $$1, $$2}'

# An interpreter that no longer starts, after an upgrade of the system say, is set up anew.
ifeq ($(shell $(PY) -c 'print("starts")' 2>/dev/null),)
$(shell rm -f .venv/*.stamp)
endif

# One stamp for each requirements file: set-up runs once, and again only when the pinned versions change.
.venv/run.stamp: requirements.txt
	@$(PY) -c "import sys; sys.exit(sys.version_info < (3, 11, 4))" 2>/dev/null || { \
		$(PYTHON) -c "import sys; sys.exit('Python 3.11.4 or later is needed; say where it is: make PYTHON=python3.12' if sys.version_info < (3, 11, 4) else 0)" \
		&& $(PYTHON) -m venv --clear .venv; }
	@$(PY) -m pip --version > /dev/null 2>&1 || $(PY) -m ensurepip --default-pip
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/dev.stamp: requirements-dev.txt .venv/run.stamp
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

demo: .venv/run.stamp  ## set up, train InfLoRA on the embedded digits, print the table and write a report
	$(PY) train.py

# Each test computes with one thread, so every core gets a process.
test: .venv/dev.stamp  ## set up, run the tests (minutes, CPU)
	$(PY) -m pytest -n auto --maxprocesses 8 --dist worksteal

test-slow: .venv/dev.stamp  ## kills, sweeps, every method through the command line; real images if INFLORA_TEST_DATA is set
	$(PY) -m pytest -m "slow or data"

.venv-oldest/stamp: pyproject.toml requirements-dev.txt | .venv/run.stamp
	$(PY) -m venv --clear .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check 'setuptools>=70.1' \
		$$(sed -n '/^dependencies/,/^]/s/.*"\(.*\)>=\(.*\)",/\1==\2/p' pyproject.toml) \
		$$(grep -E '^(pytest|hypothesis|nb|ipykernel|onnx|wandb|tensorboard)' requirements-dev.txt)
	@touch $@

# Old packages warn of newer ones beside them: no errors here.
test-oldest: .venv-oldest/stamp  ## the tests with the oldest versions that pyproject.toml allows
	.venv-oldest/bin/python -m pytest -n auto --maxprocesses 8 --dist worksteal -W default

test-gpu: .venv/dev.stamp  ## the tests that need a CUDA device
	$(PY) -m pytest -m gpu

lint: .venv/dev.stamp  ## formatting, lint, types
	.venv/bin/ruff format --check . && .venv/bin/ruff check . && .venv/bin/pyright

bench: .venv/dev.stamp  ## time the hot paths against the plain reference, as ratios; on a GPU too where there is one
	$(PY) -m benchmarks
	@if $(PY) -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then \
		failed=0; \
		for precision in 32 bf16; do \
			$(PY) -m benchmarks --backbone vit_b16 --random --device cuda --precision $$precision --out outputs/benchmarks/vit_b16_$$precision || failed=1; \
		done; \
		exit $$failed; \
	fi
