# Each target sets up what it needs on first use. Needs Python 3.11+, a C++17 compiler, pip, make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
JOBS ?= 2
RESULTS ?= benchmarks/results
SOURCES := $(shell find csrc -type f) CMakeLists.txt setup.py pyproject.toml constraints.txt
CPP := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: help setup generate test test-python test-triton test-cpp test-cuda test-cuda-python cuda gpu bench bench-report docs-results lint clean

help:
	@echo "make setup     create $(VENV) with the package (editable) and its development tools"
	@echo "make generate  paint digits at every depth into out/digits.png"
	@echo "make test      C++ tests under sanitizers, CUDA kernels on the CPU, Python tests, Triton's interpreter"
	@echo "make test-cuda the CUDA kernels' tests alone: no GPU, no nvcc"
	@echo "make cuda      compile the CUDA kernels with nvcc; registers and spills of each"
	@echo "make gpu       on a machine with a GPU: build, tests, benchmarks; results under out/gpu"
	@echo "make bench     every kernel beside its peers, then the engine; results under $(RESULTS)"
	@echo "make docs-results  docs/results.md and the README's table, from $(RESULTS)"
	@echo "make lint      ruff, clang-format and the type checker"
	@echo "make clean     remove what the above made (not $(VENV))"

setup: $(VENV)/.ready

$(VENV)/bin/python:
	@echo "== creating $(VENV)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "VARiant needs Python 3.11 or newer; try: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.torch: constraints.txt | $(VENV)/bin/python
	@echo "== installing torch"
	$(PIP) torch
	@touch $@

$(VENV)/.ready: $(SOURCES) | $(VENV)/.torch
	@echo "== building the kernels and installing the package with its development tools"
	$(PIP) --editable '.[dev]'
	@$(BIN)/python -m variant_kernels
	@touch $@

generate: setup
	@echo "== painting digits at every depth with the shipped supernet"
	$(BIN)/variant generate --model digits --all-depths --count 1 --seed 0 --out out/digits.png

test: test-cpp test-cuda test-cuda-python test-python test-triton

test-cpp: setup
	@echo "== C++ tests under AddressSanitizer and UndefinedBehaviorSanitizer"
	@mkdir -p build
	$(BIN)/cmake -S . -B build/cpp -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DVARIANT_TESTS=ON -DVARIANT_SANITIZE=ON -DCMAKE_BUILD_TYPE=RelWithDebInfo >build/cpp-configure.log 2>&1 || (cat build/cpp-configure.log; exit 1)
	$(BIN)/cmake --build build/cpp --parallel $(JOBS)
	$(BIN)/ctest --test-dir build/cpp --output-on-failure --exclude-regex '^cuda_'
	@echo "== C++ tests of the build that ships, and its symbols"
	$(BIN)/cmake -S . -B build/cpp-release -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DVARIANT_TESTS=ON -DCMAKE_BUILD_TYPE=Release >build/cpp-configure.log 2>&1 || (cat build/cpp-configure.log; exit 1)
	$(BIN)/cmake --build build/cpp-release --parallel $(JOBS)
	$(BIN)/ctest --test-dir build/cpp-release --output-on-failure

# The first of the two shares its build folder with test-cpp.
test-cuda: setup
	@echo "== CUDA kernels on the CPU under AddressSanitizer, then ThreadSanitizer, in several orders of threads"
	@mkdir -p build
	@for kind in ON thread; do \
	  folder=build/cpp; [ $$kind = ON ] || folder=build/cpp-thread; \
	  $(BIN)/cmake -S . -B $$folder -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DVARIANT_TESTS=ON -DVARIANT_SANITIZE=$$kind -DCMAKE_BUILD_TYPE=RelWithDebInfo >build/cuda-configure.log 2>&1 || { cat build/cuda-configure.log; exit 1; }; \
	  $(BIN)/cmake --build $$folder --parallel $(JOBS) --target variant_cuda_tests || exit 1; \
	  $(BIN)/ctest --test-dir $$folder --output-on-failure --parallel $(JOBS) --tests-regex '^cuda_' || exit 1; \
	done
	@command -v nvcc >/dev/null || echo "== nvcc not found: the CUDA kernels were not compiled for a GPU"

# The Python launchers on the same kernels, compiled for the CPU: the contract's tests, no GPU.
test-cuda-python: setup
	@echo "== Python tests of the CUDA backend on the CPU"
	@mkdir -p build
	$(BIN)/cmake -S . -B build/cpp-release -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DVARIANT_TESTS=ON -DCMAKE_BUILD_TYPE=Release >build/cuda-configure.log 2>&1 || (cat build/cuda-configure.log; exit 1)
	$(BIN)/cmake --build build/cpp-release --parallel $(JOBS) --target variant_cuda_emulated
	VARIANT_CUDA_EMULATION=$(abspath build/cpp-release)/csrc/cuda/tests/libvariant_cuda_emulated.so $(BIN)/python -m pytest tests/kernels -k cuda

cuda: setup
	$(BIN)/cmake -S . -B build/cuda -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DVARIANT_CUDA=1 -DPython3_EXECUTABLE=$(abspath $(BIN))/python
	$(BIN)/cmake --build build/cuda --parallel $(JOBS) --target variant_cuda

test-python: setup
	@echo "== Python tests"
	$(BIN)/python -m pytest

# No GPU needed: the interpreter runs the kernels on the CPU (float32, float16; its bfloat16 is wrong).
test-triton: setup
	@echo "== Triton kernels in their interpreter"
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n $(JOBS) -k triton tests/kernels tests/engine

# Takes the Python that has torch with CUDA, Triton and pytest; GPU_PYTHON says which.
# GPU_PARTS chooses some (build, kernels, ...); VAR_REPO and HMAR_REPO are clones of
# FoundationVision/VAR and NVlabs/HMAR.
GPU_PYTHON ?= $(PYTHON)
gpu:
	$(GPU_PYTHON) -m benchmarks.gpu $(GPU_PARTS) $(if $(VAR_REPO),--var-repo $(VAR_REPO)) $(if $(HMAR_REPO),--hmar-repo $(HMAR_REPO))

# The machine must be idle: about a quarter of an hour on two cores.
bench: setup
	@echo "== kernels beside their peers"
	@mkdir -p $(RESULTS)
	$(BIN)/python -m pytest benchmarks --json $(RESULTS)/kernels-$$($(BIN)/python -m variant.bench.environment).json --benchmark-columns=median,iqr,rounds
	@echo "== the engine, digits"
	$(BIN)/variant bench --model digits --batch 1 8 --dtype float32 bfloat16 --runs 15 --decoder --json $(RESULTS)/engine-digits-$$($(BIN)/python -m variant.bench.environment).json
	@$(MAKE) --no-print-directory bench-report

bench-report: setup
	$(BIN)/python -m benchmarks.report $(RESULTS)/*-$$($(BIN)/python -m variant.bench.environment).json --out out/report

# docs/results.md and the README's table of gains; a test compares both with the result files.
docs-results: setup
	$(BIN)/python -m benchmarks.docs_results

lint: setup
	@echo "== ruff"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@echo "== clang-format"
	$(BIN)/clang-format --dry-run -Werror $(CPP)
	@echo "== type checker"
	$(BIN)/basedpyright --pythonpath $(BIN)/python

clean:
	rm -rf build dist *.egg-info out/digits.png .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
