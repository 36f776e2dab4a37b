# Two commands from a fresh machine: `make sample` draws images, `make test` proves them right.
PYTHON ?= python3
TORCH ?= torch==2.13.0
OUT ?= out
VENV := .venv
# A worker a core, each taking what another has not begun. Not in pyproject.toml: with workers nothing can be timed,
# and pytest-benchmark runs no benchmark. They share the cores: a thread that waits for another must not spin.
PYTEST := OMP_WAIT_POLICY=passive $(VENV)/bin/pytest -n logical --maxprocesses 4 --dist worksteal
# Those of the rooms that only CUDA enters run by themselves, because measuring coverage would slow all others.
ON_CUDA := tests/runtimes/cuda tests/runtimes/tensorrt tests/runtimes/onnx/test_on_cuda.py tests/runtimes/onnx/test_fused.py

.PHONY: sample test format clean

sample: $(VENV)/.installed
	$(VENV)/bin/python -m dgfast.sample --compile --out $(OUT)

test: $(VENV)/.installed-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(PYTEST) $(addprefix --ignore=,$(ON_CUDA))
	$(PYTEST) $(ON_CUDA) --cov=dgfast/runtimes --cov-report=
	$(VENV)/bin/python -m tests.cuda_rooms

format: $(VENV)/.installed-test
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

$(VENV)/.installed: pyproject.toml
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet $(TORCH)
	$(VENV)/bin/pip install --quiet --editable .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(VENV)/bin/pip install --quiet --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) .coverage .mypy_cache .pytest_cache .ruff_cache
