# `make demo` and `make test` run on a bare checkout: Python >= 3.11, pip, make.

PYTHON ?= python3
BACKEND ?= jax
BACKENDS := jax tensorflow torch
VENV := .venv
CONSTRAINTS := constraints.txt
TEST_EXTRAS := tensorflow,jax,torch,test
BIN := $(VENV)/bin
GPU_PYTHON ?= $(BIN)/python
# Two processes per backend, one after the other: `PYTEST_ARGS=` for one. Who has
# nothing left to run takes tests from the other.
PYTEST_ARGS ?= --numprocesses 2 --dist worksteal
# Python compiles what it imports. All that is installed would take half as long
# again.
PIP_INSTALL := $(BIN)/python -m pip install --quiet --no-compile \
  --constraint $(CONSTRAINTS)

export TF_CPP_MIN_LOG_LEVEL ?= 3

# The tests' tensors are too small to be worth more than one thread each.
test-%: export OMP_NUM_THREADS ?= 1
test-%: export TF_NUM_INTRAOP_THREADS ?= 1
# JAX' tests spend most of their time on compiling. They need neither LLVM's
# optimizations, which are a third of it, nor the code generator in front of
# them, MLIR's, which takes half of what is left then. `make test-long` has both.
# A JAX that doesn't know the flag says so and stops: `make test XLA_FLAGS=`.
test-%: export JAX_DISABLE_MOST_OPTIMIZATIONS ?= 1
test-jax test-once: export XLA_FLAGS ?= --xla_cpu_use_fusion_emitters=false

.PHONY: demo test test-once test-oldest test-models test-long mutations bench \
  bench-quick bench-gpu bench-gpu-tiny gpu-programs quality quality-gpu \
  quality-quick docs dist \
  docs-analysis docs-coverage docs-compatibility docs-distributed docs-gallery \
  lint format clean \
  $(addprefix test-,$(BACKENDS)) $(addprefix test-oldest-,$(BACKENDS))

demo: $(VENV)/.demo-$(BACKEND)
	KERAS_BACKEND=$(BACKEND) $(BIN)/python examples/digits.py

# Stops at the first part that fails.
test: test-once $(addprefix test-,$(BACKENDS))

# What doesn't depend on the backend: files, pages, arguments, pictures.
test-once: $(VENV)/.test
	@echo "== Tests that are the same with each backend"
	@KERAS_BACKEND=jax $(BIN)/python -m pytest --quiet $(PYTEST_ARGS) \
	  -m "once and not slow" \
	  || { echo "== FAILED, whatever the backend"; exit 1; }

$(addprefix test-,$(BACKENDS)): test-%: $(VENV)/.test
	@echo "== Tests with the $* backend"
	@KERAS_BACKEND=$* $(BIN)/python -m pytest --quiet $(PYTEST_ARGS) \
	  -m "not once and not slow" \
	  || { echo "== FAILED with the $* backend"; exit 1; }

# The suite with the oldest versions that pyproject.toml allows, each backend
# alone in .venv-oldest-...: they need different versions of what they share.
# There is no keras_hub for TensorFlow 2.18. What a test misses, it says.
test-oldest: $(addprefix test-oldest-,$(BACKENDS))

$(addprefix test-oldest-,$(BACKENDS)): test-oldest-%:
	$(MAKE) $(if $(filter jax,$*),test-once) test-$* \
	  VENV=.venv-oldest-$* CONSTRAINTS=constraints-oldest.txt XLA_FLAGS= \
	  TEST_EXTRAS=$*,test-without-hub

# Also the models that take some backend minutes to compile.
test-models: $(VENV)/.test
	@for backend in $(BACKENDS); do \
	  echo "== Models with the $$backend backend"; \
	  KERAS_BACKEND=$$backend $(BIN)/python -m pytest --quiet \
	    $(PYTEST_ARGS) -m "slow or not slow" tests/test_real_models.py \
	    || exit 1; \
	done

# Tests that take long: 60 times as many random layers and models, ten processes
# that are killed, two workers bit for bit, 20,000 steps. An hour.
test-long: export ADAFISHER_CASES ?= 6000
# As users run it.
test-long: export JAX_DISABLE_MOST_OPTIMIZATIONS = 0
test-long: $(VENV)/.test
	@echo "== Long tests that are the same with each backend"
	@KERAS_BACKEND=jax $(BIN)/python -m pytest --quiet $(PYTEST_ARGS) \
	  -m once tests/test_benchmarks.py tests/test_gpu_benchmark.py
	@for backend in $(BACKENDS); do \
	  echo "== Long tests with the $$backend backend"; \
	  KERAS_BACKEND=$$backend $(BIN)/python -m pytest --quiet \
	    $(PYTEST_ARGS) -m "not once" tests/test_decision_scope.py \
	    tests/test_distributed_$$backend.py tests/test_examples.py \
	    tests/test_faults.py \
	    tests/test_long_run.py tests/test_properties.py || exit 1; \
	done

# Breaks the package in small ways and tells which of them no test notices.
mutations: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutations.py

# Writes docs/performance.md, in half an hour on two cores. What an interrupted
# run has measured is kept: `make bench BENCH_ARGS=--fresh` starts over.
bench: BENCH_LEVEL := full
bench: BENCH_OUTPUT := docs

# A few minutes. The page is benchmarks/results/quick/performance.md.
bench-quick: BENCH_LEVEL := quick
bench-quick: BENCH_OUTPUT := benchmarks/results/quick

bench bench-quick: $(VENV)/.test
	@for backend in $(BACKENDS); do \
	  for benchmark in step_time memory scaling; do \
	    KERAS_BACKEND=$$backend $(BIN)/python benchmarks/$$benchmark.py \
	      --level $(BENCH_LEVEL) $(BENCH_ARGS) || exit 1; \
	  done; \
	done
	$(BIN)/python -m tools.report.performance --output $(BENCH_OUTPUT) \
	  --results benchmarks/results/$(BENCH_LEVEL)

# Writes docs/performance_gpu.md, in eight minutes on a machine with a GPU. With an
# interpreter that has JAX and PyTorch for it, and Keras: `GPU_PYTHON=python3`.
bench-gpu: $(if $(filter $(BIN)/%,$(GPU_PYTHON)),$(VENV)/.test)
	$(GPU_PYTHON) benchmarks/gpu.py $(BENCH_ARGS)
	$(GPU_PYTHON) -m tools.report.performance_gpu

# Whether that works, on a CPU: all of it in a tiny form, in two minutes.
bench-gpu-tiny: $(VENV)/.test
	$(BIN)/python benchmarks/gpu.py --tiny
	$(BIN)/python -m tools.report.performance_gpu \
	  --results benchmarks/results/tiny --output benchmarks/results/tiny

# Which kernels JAX compiles for a GPU, without one: part of
# docs/performance_gpu.md. In twenty minutes, with an interpreter that has Keras
# and `jax[cuda13]`: `GPU_PYTHON=python3`.
gpu-programs: $(if $(filter $(BIN)/%,$(GPU_PYTHON)),$(VENV)/.test)
	PYTHONPATH=.:$$PYTHONPATH $(GPU_PYTHON) benchmarks/gpu_programs.py $(BENCH_ARGS)
	$(GPU_PYTHON) -m tools.report.performance_gpu

# A GPT of 25 million weights on one GPU, in half an hour.
quality-gpu: $(if $(filter $(BIN)/%,$(GPU_PYTHON)),$(VENV)/.test)
	$(GPU_PYTHON) benchmarks/quality_gpu.py $(BENCH_ARGS)

# Writes docs/quality.md. What was measured before is kept, also what the
# repository has: that is how an interrupted run goes on. To measure all anew, in
# two hours on two cores: `make quality BENCH_ARGS=--fresh`.
quality: BENCH_LEVEL := full
quality: BENCH_OUTPUT := docs

# A few minutes, three small tasks.
quality-quick: BENCH_LEVEL := quick
quality-quick: BENCH_OUTPUT := benchmarks/results/quick

quality quality-quick: $(VENV)/.test
	KERAS_BACKEND=jax $(BIN)/python benchmarks/quality.py \
	  --level $(BENCH_LEVEL) $(BENCH_ARGS)
	KERAS_BACKEND=jax $(BIN)/python benchmarks/quality_schedules.py \
	  --level $(BENCH_LEVEL) $(BENCH_ARGS)
	KERAS_BACKEND=jax $(BIN)/python benchmarks/quality_fit.py \
	  --level $(BENCH_LEVEL) $(BENCH_ARGS) --processes 1
	$(BIN)/python -m tools.report.quality --output $(BENCH_OUTPUT) \
	  --results benchmarks/results/$(BENCH_LEVEL)

# The site, in site/. Fails on a broken link or anchor. Needs no network once
# its tools are installed.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# The distributions, in dist/, as PyPI takes them.
dist: $(VENV)/.dist
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*

# Writes docs/coverage.md.
docs-coverage: $(VENV)/.test
	$(BIN)/python -m tools.report.coverage

# Draws the pictures of docs/analysis.md, and writes its table.
docs-analysis: $(VENV)/.test
	$(BIN)/python -m tools.report.analysis

# Draws the pictures of docs/gallery.md.
docs-gallery: $(VENV)/.test
	KERAS_BACKEND=jax $(BIN)/python -m tools.report.gallery

# Writes docs/compatibility.md.
docs-compatibility: $(VENV)/.test
	$(BIN)/python -m tools.report.compatibility

# Writes the table of docs/distributed.md.
docs-distributed: $(VENV)/.test
	$(BIN)/python -m tools.report.distributed

lint: $(VENV)/.lint
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

format: $(VENV)/.lint
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

clean:
	rm -rf $(VENV) .venv-oldest-* site dist

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo-%: $(BIN)/python pyproject.toml $(CONSTRAINTS)
	$(PIP_INSTALL) --editable ".[$*,examples]"
	@touch $@

$(VENV)/.test: $(BIN)/python pyproject.toml $(CONSTRAINTS)
	$(PIP_INSTALL) --editable ".[$(TEST_EXTRAS)]"
	@touch $@

$(VENV)/.lint: $(BIN)/python pyproject.toml $(CONSTRAINTS)
	$(PIP_INSTALL) "mypy>=2.4" "ruff>=0.17"
	@touch $@

# Without a backend: the docstrings are read, not imported.
$(VENV)/.docs: $(BIN)/python pyproject.toml $(CONSTRAINTS)
	$(PIP_INSTALL) --editable ".[docs]"
	@touch $@

$(VENV)/.dist: $(BIN)/python $(CONSTRAINTS)
	$(PIP_INSTALL) build twine
	@touch $@
