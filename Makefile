# Two commands from a fresh machine: `make sample` draws images, `make test` proves them right.
PYTHON ?= python3
TORCH ?= torch==2.13.0
OUT ?= out
VENV := .venv
# A worker a core, each taking what another has not begun. Not in pyproject.toml: with workers nothing can be timed,
# and pytest-benchmark runs no benchmark. They share the cores: a thread that waits for another must not spin.
WORKERS := -n logical --maxprocesses 4 --dist worksteal
PYTEST := OMP_WAIT_POLICY=passive $(VENV)/bin/pytest
# Those of the rooms that only CUDA enters run by themselves, because measuring coverage would slow all others.
ON_CUDA := tests/runtimes/cuda tests/runtimes/tensorrt tests/runtimes/onnx/test_on_cuda.py tests/runtimes/onnx/test_fused.py

.PHONY: sample test rooms cuda-rooms format clean

sample: $(VENV)/.installed
	$(VENV)/bin/python -m dgfast.sample --compile --out $(OUT)

# What takes one core, mypy among it, runs beside the workers: they are done together, and no core is idle before that.
test: $(VENV)/.installed-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(MAKE) --jobs=2 rooms cuda-rooms

rooms:
	$(PYTEST) $(WORKERS) $(addprefix --ignore=,$(ON_CUDA))

cuda-rooms:
	$(VENV)/bin/mypy
	OMP_NUM_THREADS=1 $(PYTEST) $(ON_CUDA) --cov=dgfast/runtimes --cov-report=
	$(VENV)/bin/python -m tests.cuda_rooms

format: $(VENV)/.installed-test
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# In one call, which resolves and unpacks once; Python compiles what is imported, a tenth of what there is.
$(VENV)/.installed-test: EXTRAS := [test]
$(VENV)/.installed $(VENV)/.installed-test: pyproject.toml
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --no-compile $(TORCH) --editable '.$(EXTRAS)'
	touch $(VENV)/.installed $@

clean:
	rm -rf $(VENV) .coverage .mypy_cache .pytest_cache .ruff_cache
