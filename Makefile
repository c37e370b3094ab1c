# Each target sets up what it needs on first use. Needs Python 3.11+, a C++17 compiler, pip, make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# Numbers of processes that compile, and that run tests. Each test process imports torch.
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
TEST_JOBS ?= $(shell [ $(JOBS) -gt 8 ] && echo 8 || echo $(JOBS))
# Empty: bytecode is written even where the environment forbids it, as in many containers. Otherwise
# each test process compiles every module anew, and pytest rewrites every assertion (10 s of 20 s of
# collection).
export PYTHONDONTWRITEBYTECODE :=
# CPU instruction sets under AddressSanitizer: the portable one and the best one of this machine.
SANITIZED_ISAS ?= local
RESULTS ?= benchmarks/results
SOURCES := $(shell find csrc -type f -not -path '*/tests/*' -not -path '*/__pycache__/*') CMakeLists.txt setup.py pyproject.toml constraints.txt
CPP := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
# setup.py builds here (build_folder); tests of what is installed share its objects.
RELEASE = build/$(shell $(BIN)/python -c 'import sysconfig; print(sysconfig.get_config_var("SOABI"))')
# Instruction sets of the CPU kernels: those of this machine, or all after `make dev`.
BUILD = VARIANT_CPU_ISAS=$(if $(wildcard $(VENV)/.dev),all,local)
# $(call cmake,FOLDER,OPTIONS,TARGETS) configures a folder with the tests, quietly, and builds.
cmake = mkdir -p $(1) && { $(BIN)/cmake -S . -B $(1) -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DVARIANT_TESTS=ON $(2) >$(1)/configure.log 2>&1 || { cat $(1)/configure.log; exit 1; }; } && $(BIN)/cmake --build $(1) --parallel $(JOBS) --target $(3)
SANITIZED = -DCMAKE_BUILD_TYPE=RelWithDebInfo -DVARIANT_CPU_ISAS=$(SANITIZED_ISAS)
CTEST := $(BIN)/ctest --output-on-failure
# COVERAGE=1 records the branches that the Python tests take, for `make coverage`.
PYTEST = $(BIN)/python $(if $(COVERAGE),-m coverage run) -m pytest -n $(TEST_JOBS)

.PHONY: help setup dev generate check test test-python test-triton test-robustness sanitized-programs test-cpp test-cuda test-cuda-python test-isas test-tsan coverage-cpp nightly coverage mutants cuda sass gpu gpu-artefacts bench bench-report docs-results study study-report lint clean

help:
	@echo "make generate  generate digits and clothes at every depth into out"
	@echo "make setup     create $(VENV) with the package (editable)"
	@echo "make dev       add the development tools, and compile for every CPU instruction set"
	@echo "make check     a few minutes: lint, op tests of the reference and CPU backends, one generation"
	@echo "make test      C++ tests under sanitizers, CUDA kernels on the CPU, Python tests, Triton's interpreter"
	@echo "make test-cuda the CUDA kernels' tests alone: no GPU, no nvcc"
	@echo "make coverage  branch coverage of \`make test COVERAGE=1\`, below the bounds a failure"
	@echo "make mutants   changes the code in one place at a time; tests must notice"
	@echo "make test-isas the CPU kernels' and the engine's tests with every instruction set of this machine, all as with AVX2 alone"
	@echo "make test-tsan Python tests of threads with the CPU kernels under ThreadSanitizer"
	@echo "make coverage-cpp  lines of csrc/cpu that the C++ tests run; below 90 % is an error"
	@echo "make nightly   all of these with sanitizers on every CPU instruction set; goes on where it stopped"
	@echo "make cuda      compile the CUDA kernels with nvcc for the usual GPUs; registers and spills of each"
	@echo "make sass      compile the Triton kernels for sm_90; compare their machine code with tests/machine_code"
	@echo "make gpu       on a machine with a GPU: every measurement in nine minutes, into out/gpu"
	@echo "make gpu-artefacts  beforehand, without a GPU: what make gpu would compile, for build/gpu-artefacts"
	@echo "make bench     every kernel beside its peers, then the engine; results under $(RESULTS)"
	@echo "make docs-results  docs/results.md and the numbers of README and guides; docs/recipes.md"
	@echo "make study     every run of the study, up to 6 hours on two idle cores; goes on where it stopped"
	@echo "make study-report  docs/study.md, its plots and README's table, from benchmarks/study/results"
	@echo "make lint      ruff, clang-format and the type checker"
	@echo "make clean     remove the files made by the targets above (not $(VENV))"

setup: $(VENV)/.ready

dev: $(VENV)/.dev

$(VENV)/bin/python:
	@echo "== creating $(VENV)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "VARiant needs Python 3.11 or newer; try: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.torch: constraints.txt | $(VENV)/bin/python
	@echo "== installing torch"
	$(PIP) torch
	@touch $@

# Without build isolation pip needs these beforehand; it creates no second environment for each build.
$(VENV)/.build-requires: pyproject.toml | $(VENV)/bin/python
	@echo "== installing the build requirements"
	@$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], sep="\n")' >$@.txt
	$(PIP) --requirement $@.txt
	@touch $@

$(VENV)/.ready: $(SOURCES) | $(VENV)/.torch $(VENV)/.build-requires
	@echo "== building the kernels and installing the package"
	$(BUILD) $(PIP) --no-build-isolation --editable .
	@cat $(RELEASE)/decisions.txt
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/.ready
	@echo "== installing the development tools, and building for every CPU instruction set"
	VARIANT_CPU_ISAS=all $(PIP) --no-build-isolation --editable '.[dev]'
	@$(BIN)/python -m variant_kernels
	@touch $@

generate: setup
	@echo "== generating digits and clothes at every depth with the shipped supernets"
	$(BIN)/variant generate --model digits --all-depths --count 1 --seed 0 --overwrite --out out/digits.png
	$(BIN)/variant generate --model fashion-mnist --labels t-shirt trouser pullover dress coat sandal shirt sneaker bag 'ankle boot' --all-depths --seed 0 --overwrite --out out/fashion-mnist.png

check: lint
	@echo "== op tests of the reference and CPU backends"
	$(PYTEST) tests/kernels -k '(reference or cpu) and not instruction_set'
	@$(MAKE) --no-print-directory generate

test: test-cpp coverage-cpp test-cuda test-cuda-python test-python test-robustness test-triton

# Compiles what test-cpp and test-cuda run under sanitizers; needs neither torch nor the package.
sanitized-programs: $(VENV)/.build-requires
	@$(call cmake,build/cpp,$(SANITIZED) -DVARIANT_SANITIZE=ON,variant_tests variant_cuda_tests)
	@$(call cmake,build/cpp-thread,$(SANITIZED) -DVARIANT_SANITIZE=thread,variant_cuda_tests)

test-cpp: dev
	@echo "== C++ tests of the installed kernels, and their symbols"
	@$(call cmake,$(RELEASE),,variant_tests)
	$(CTEST) --test-dir $(RELEASE) --parallel $(JOBS)
	@echo "== C++ tests under AddressSanitizer and UndefinedBehaviorSanitizer"
	@$(call cmake,build/cpp,$(SANITIZED) -DVARIANT_SANITIZE=ON,variant_tests)
	$(CTEST) --test-dir build/cpp --parallel $(JOBS) --exclude-regex '^cuda_'

# With -Og, whose lines are those of the source (-O0 takes three times as long), with the portable
# instruction set and the best one of this machine: the other ones compile the same lines. A line of a template counts once. The code that joins the kernels to
# Python (csrc/bindings.cpp) is not counted: the Python tests run it.
coverage-cpp: dev
	@echo "== line coverage of csrc/cpu by the C++ tests"
	@$(call cmake,build/cpp-coverage,-DCMAKE_BUILD_TYPE=Debug -DVARIANT_CPU_ISAS=local -DVARIANT_COVERAGE=ON,variant_tests)
	@find build/cpp-coverage -name '*.gcda' -delete
	$(CTEST) --test-dir build/cpp-coverage --parallel $(JOBS) --exclude-regex '^symbols_'
	$(BIN)/python -m gcovr --root . --filter csrc/cpu/ --merge-lines --txt-metric line --fail-under-line 90 build/cpp-coverage

# Orders of threads: 0 forwards, 1 backwards, 2 and 3 random. Results depend on the order;
# ThreadSanitizer finds a race by what synchronizes two accesses, and needs fewer orders. The Python
# tests of the emulated backend run forwards.
EMULATED_ORDERS ?= 2
RACE_ORDERS ?= 2
# The first of the two shares its build folder with test-cpp.
test-cuda: dev
	@echo "== CUDA kernels on the CPU under AddressSanitizer, in several orders of threads"
	@$(call cmake,build/cpp,$(SANITIZED) -DVARIANT_SANITIZE=ON,variant_cuda_tests)
	$(CTEST) --test-dir build/cpp --parallel $(JOBS) --tests-regex '^cuda_.*seed[$(EMULATED_ORDERS)]$$'
	@echo "== CUDA kernels on the CPU under ThreadSanitizer, in several orders of threads"
	@$(call cmake,build/cpp-thread,$(SANITIZED) -DVARIANT_SANITIZE=thread,variant_cuda_tests)
	$(CTEST) --test-dir build/cpp-thread --parallel $(JOBS) --tests-regex '^cuda_.*seed[$(RACE_ORDERS)]$$'

# The Python launchers on the same kernels, compiled for the CPU: the contract's tests, no GPU.
test-cuda-python: dev
	@echo "== Python tests of the CUDA backend on the CPU"
	@$(call cmake,$(RELEASE),,variant_cuda_emulated)
	VARIANT_CUDA_EMULATION=$(abspath $(RELEASE))/csrc/cuda/tests/libvariant_cuda_emulated.so $(PYTEST) tests/kernels -k cuda

TESTS ?= tests --ignore tests/robustness
test-python: dev
	@echo "== Python tests"
	$(PYTEST) $(TESTS)

# Random and seeded: a failing case prints the command that repeats it. The variables of the
# numbers of cases are in CONTRIBUTING.md. Without COVERAGE: each call runs in a process of its own.
RANDOM_TESTS ?= tests/robustness
test-robustness: override COVERAGE =
test-robustness: dev
	@echo "== random bad calls, hostile files, exactness, signals, pressure"
	$(PYTEST) $(RANDOM_TESTS)

# In `make test`, tests/kernels/test_instruction_sets.py runs the kernels' own tests with each set. Here
# come all tests of the kernels and the engine, and those of older processors, on which oneDNN has no
# fast bfloat16 products.
test-isas: dev
	@for isa in $$($(BIN)/python -c 'from variant_kernels.cpu_ops.common import build_info as info; print(*(isa for isa in info()["isas_supported"] if isa != info()["isa"]))'); do \
	  echo "== tests of the CPU kernels and the engine with VARIANT_CPU_ISA=$$isa"; \
	  VARIANT_CPU_ISA=$$isa $(PYTEST) tests/kernels tests/engine -k 'not cuda and not triton and not instruction_set' || exit 1; \
	done
	@echo "== Python tests as on a processor with AVX2 and no AVX-512"
	@# Inductor's cache does not tell instruction sets apart: code for another one writes out of bounds.
	ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 VARIANT_CPU_ISA=avx2 TORCHINDUCTOR_CACHE_DIR=$(abspath build/inductor-avx2) $(PYTEST) tests --ignore tests/robustness -k 'not cuda and not triton and not instruction_set'

# ThreadSanitizer sees the accesses of our kernels alone: torch and Python are not instrumented, and
# what they synchronize by means of OpenMP is unknown to it (ignore_noninstrumented_modules). The
# kernels use std::thread here instead of OpenMP (csrc/cpu/parallel.h), with the same pieces. Needs
# g++. To see that a race is found, give all threads the same memory: in parallel.h, under
# VARIANT_STD_THREADS, write f(piece, 0) for f(piece, thread).
TSAN = build/python-thread
TSAN_TESTS = $(addprefix tests/kernels/test_,$(addsuffix .py,cpu_launchers adaln block_causal_attention kv8 paged_attention qk_norm qk_norm_append_paged_kv sample_tokens)) tests/engine/test_engine.py
test-tsan: dev
	@echo "== Python tests of the CPU kernels under ThreadSanitizer"
	@$(call cmake,$(TSAN),$(SANITIZED) -DVARIANT_TESTS=OFF -DVARIANT_SANITIZE=thread -DVARIANT_CUDA=0 -DVARIANT_PYTHON=ON -DVARIANT_EXT_NAME=_C.so -DVARIANT_PYTHON_INCLUDE=$(shell $(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("include"))') -DVARIANT_PYBIND11_INCLUDE=$(shell $(BIN)/python -c 'import pybind11; print(pybind11.get_include())'),variant_python)
	@rm -f $(TSAN)/races.*
	VARIANT_TSAN_EXTENSION=$(abspath $(TSAN))/_C.so LD_PRELOAD=$$($${CXX:-c++} -print-file-name=libtsan.so) TSAN_OPTIONS=ignore_noninstrumented_modules=1:exitcode=66:log_path=$(abspath $(TSAN))/races $(BIN)/python -m pytest -p tests.thread_sanitizer -p no:cacheprovider $(TSAN_TESTS) -k '(cpu or thread) and not opcheck and not instruction_set' || { cat $(TSAN)/races.*; exit 1; }

# No GPU needed: the interpreter runs the kernels on the CPU (float32, float16; its bfloat16 is wrong).
test-triton: override COVERAGE =
test-triton: dev
	@echo "== Triton kernels in their interpreter"
	TRITON_INTERPRET=1 $(PYTEST) tests/kernels tests/engine tests/robustness -k triton

# In parts; one that fails stops no other. Started again, it goes on with those that have not passed.
nightly: dev
	$(BIN)/python -m tests.nightly

# After `make test COVERAGE=1`: the data of test-python and test-cuda-python together. 95 % of
# variant_kernels is the aim; the bound leaves room for processors on which some tests are skipped.
coverage: dev
	@echo "== branch coverage"
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage json --quiet -o build/coverage/report.json
	$(BIN)/python tests/branch_coverage.py build/coverage/report.json variant_kernels=93 variant=90

MUTANTS ?= 200
mutants: dev
	@echo "== mutants"
	$(BIN)/python -m tests.mutation --count $(MUTANTS)

# Compiles into the installed package and stops at a register spill that spills.txt does not list.
cuda: setup
	@echo "== compiling the CUDA kernels with nvcc"
	$(BUILD) VARIANT_CUDA=1 VARIANT_CUDA_SPILLS=fail $(BIN)/python setup.py build_ext --inplace

# No GPU needed. SASS: how the names of the wanted cases begin. WRITE=1 writes the tables anew. Twice:
# with the installed Triton, and with that of the torch release that runs on GPUs today (2.11).
OTHER_TRITON = 3.6.0
build/triton-%/.ready:
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(@D) triton==$*
	@touch $@

sass: dev build/triton-$(OTHER_TRITON)/.ready
	@echo "== machine code of the Triton kernels"
	$(BIN)/python -m tests.machine_code $(if $(SASS),'$(SASS)') $(if $(WRITE),--write)
	PYTHONPATH=build/triton-$(OTHER_TRITON) $(BIN)/python -m tests.machine_code $(if $(SASS),'$(SASS)') $(if $(WRITE),--write)

# On a machine with a GPU, for at most nine minutes. Uses the Python that has torch with CUDA, Triton
# and pytest (GPU_PYTHON). GPU_STEPS chooses some steps (smoke, kernels, ...); VAR_REPO and HMAR_REPO
# are clones of FoundationVision/VAR and NVlabs/HMAR.
GPU_PYTHON ?= $(PYTHON)
gpu:
	$(GPU_PYTHON) -m benchmarks.gpu $(GPU_STEPS) $(if $(VAR_REPO),--var-repo $(VAR_REPO)) $(if $(HMAR_REPO),--hmar-repo $(HMAR_REPO))

# Beforehand and anywhere: what `make gpu` would compile, under the Python and the versions of the GPU
# machine. torch with CUDA takes 5 GB in build/gpu-python; torch and Triton run without a GPU there.
ARTEFACTS_PYTHON ?= python3.12
ARTEFACTS_PACKAGES ?= torch==2.11.0 triton==3.6.0
ARTEFACTS_ARCHS ?= 90a
build/gpu-python/.ready:
	$(ARTEFACTS_PYTHON) -m venv build/gpu-python
	build/gpu-python/bin/pip install --quiet $(ARTEFACTS_PACKAGES) 'setuptools>=77' cmake ninja pybind11 numpy pillow pydantic safetensors huggingface_hub rich pytest pytest-benchmark pytest-timeout hypothesis scipy
	@touch $@

gpu-artefacts: build/gpu-python/.ready
	VARIANT_CUDA=1 VARIANT_CUDA_ARCHS="$(ARTEFACTS_ARCHS)" VARIANT_CPU_ISAS=all build/gpu-python/bin/python setup.py build_ext --inplace
	build/gpu-python/bin/python -m benchmarks.gpu.artefacts --jobs $(JOBS)

# The machine must be idle: about a quarter of an hour on two cores.
bench: dev
	@echo "== kernels beside their peers"
	@mkdir -p $(RESULTS)
	$(BIN)/python -m pytest benchmarks --json $(RESULTS)/kernels-$$($(BIN)/python -m variant.bench.environment).json --benchmark-columns=median,iqr,rounds
	@echo "== the engine, digits"
	$(BIN)/variant bench --model digits --batch 1 8 --dtype float32 bfloat16 --runs 15 --decoder --json $(RESULTS)/engine-digits-$$($(BIN)/python -m variant.bench.environment).json
	@$(MAKE) --no-print-directory bench-report

bench-report: dev
	$(BIN)/python -m benchmarks.report $(RESULTS)/*-$$($(BIN)/python -m variant.bench.environment).json --out out/report

# docs/results.md, docs/recipes.md and what stands between marks in the README and the guides; a test
# compares them with their sources.
docs-results: dev
	$(BIN)/python -m benchmarks.docs_results

# Into build/study; the result files, the page and its plots are committed.
study: dev
	$(BIN)/python -m benchmarks.study run --out build/study --jobs $(JOBS)
	$(BIN)/python -m benchmarks.study collect --out build/study
	$(BIN)/python -m benchmarks.study report
	$(BIN)/python -m benchmarks.docs_results

# A test compares the page with the files, and the digests that its plots carry.
study-report: dev
	$(BIN)/python -m benchmarks.study report
	$(BIN)/python -m benchmarks.docs_results

lint: dev
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
