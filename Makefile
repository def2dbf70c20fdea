# PYTHON and VENV may be set, as in: make test PYTHON=python3.12 VENV=.venv312
# ARGS goes to pytest, the demo and the benchmarks, as in: make test ARGS="-k adam"
PYTHON ?= python3
VENV ?= .venv
ARGS ?=

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.NOTPARALLEL:
.DEFAULT_GOAL := help

BIN := $(abspath $(VENV))/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
# So that the build finds the environment's ninja.
export PATH := $(BIN):$(PATH)
export PYTHONUNBUFFERED := 1

CXX_FILES := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
CXX_TESTS := $(shell find tests bench -name '*.h' -o -name '*.cpp' -o -name '*.cu')
# The folders are here because they change when a source is removed.
CXX_INPUTS := $(CXX_FILES) $(shell find csrc -type d) setup.py

.PHONY: help
help: ## show this list
	@echo "Usage: make TARGET   (Python: $(PYTHON), virtual environment: $(VENV))"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# Each stamp in the virtual environment says that a step of the set-up is done.
LOG := $(VENV)/setup.log
VENV_MADE := $(VENV)/.made
TORCH_INSTALLED := $(VENV)/.torch-installed
PACKAGE_INSTALLED := $(VENV)/.package-installed
PIP_INSTALL = $(BIN)/python -m pip install --disable-pip-version-check --constraint $(CONSTRAINTS)

# TORCH=2.11.0 chooses another PyTorch than the one that constraints.txt pins, with what it asks for.
TORCH ?=
CONSTRAINTS := $(if $(TORCH),$(VENV)/constraints.txt,constraints.txt)
OF_TORCH := ^(torch|torchvision|triton|cuda|nvidia)[a-z0-9-]*==
$(VENV)/constraints.txt: constraints.txt Makefile | $(VENV_MADE)
	@grep -vE '$(OF_TORCH)' constraints.txt > $@
	@echo 'torch==$(TORCH)' >> $@

# Shows what is downloaded and compiled, as it happens; everything else is in the log.
define PROGRESS
s/^ *Downloading ([^-]+)-([^-]+)-.*\.whl (\(.* [MG]B\)).*/      \1 \2 \3/p
s/^ *Installing collected packages: .*/      unpacking (takes a while)/p
s/^ *fused_ema is (built for .*)/      \1/p
s/^ *(\[[0-9]+\/[0-9]+\]) .* -c [^ ]*\/(csrc\/[^ ]+).*/      \1 compiled \2/p
/^ERROR|: (fatal )?(error|warning): /p
endef
export PROGRESS

# Line by line: GNU's, or another.
SED := $(if $(shell sed --version 2>/dev/null),sed -unE,sed -lnE)

define logged
$(1) 2>&1 | tee $(LOG) | $(SED) "$$PROGRESS" \
	|| { echo "failed; the end of $(LOG):"; tail -n 30 $(LOG); exit 1; }
endef

stop_unless = @$(1) >/dev/null 2>&1 || { echo "fused_ema needs $(2)" >&2; exit 1; }
NEWER_PYTHON := Python 3.10 or later: $(PYTHON) is none (choose one with PYTHON=...)
PYTHON_HEADERS := the headers of $(PYTHON) (Debian, Ubuntu: apt-get install python3-dev)
PYTHON_VENV := the venv module of $(PYTHON) (Debian, Ubuntu: apt-get install python3-venv)
COMPILER := a C++ compiler: $(CXX) is none (Debian, Ubuntu: apt-get install g++; or choose one with CXX=...)

$(VENV_MADE):
	$(call stop_unless,$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))',$(NEWER_PYTHON))
	$(call stop_unless,$(PYTHON) -c 'import ensurepip',$(PYTHON_VENV))
	$(call stop_unless,test -e "$$($(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h",$(PYTHON_HEADERS))
	$(if $(FUSED_EMA_NO_EXTENSION),,$(call stop_unless,$(CXX) --version,$(COMPILER)))
	@echo "[1/3] Making the virtual environment $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

# First, because the extension is built against the torch that is installed.
$(TORCH_INSTALLED): $(CONSTRAINTS) pyproject.toml | $(VENV_MADE)
	@echo "[2/3] Installing PyTorch (several GB: minutes the first time)"
	@$(call logged,$(PIP_INSTALL) pip setuptools wheel ninja torch)
	@touch $@

$(PACKAGE_INSTALLED): $(TORCH_INSTALLED) $(CXX_INPUTS) $(if $(wildcard fused_ema/_native*.so),,no-extension)
	$(if $(FUSED_EMA_NO_EXTENSION),,$(call stop_unless,$(CXX) --version,$(COMPILER)))
	@echo "[3/3] Installing the tools, building the extension"
	@$(call logged,$(PIP_INSTALL) --verbose --no-build-isolation --editable ".[dev]")
	@touch $@

.PHONY: no-extension
no-extension:

.PHONY: setup
setup: $(PACKAGE_INSTALLED) ## make the virtual environment and build the extension, if they are not right yet
	@:

.PHONY: demo
demo: setup ## run the demonstration
	@$(BIN)/python -m fused_ema.demo $(ARGS)

# A worker a core; what a module's fixtures make is made in one of them.
IN_PARALLEL := --numprocesses auto --dist loadgroup

.PHONY: test
test: lint docs test-suite ## lint, build the docs, then run the tests
	@$(MAKE) --no-print-directory test-shim

.PHONY: test-suite
test-suite: setup ## run the tests that need no sanitizer, without lint and docs
	@$(BIN)/pytest $(IN_PARALLEL) $(ARGS)

SECONDS ?= 600

.PHONY: fuzz
fuzz: setup ## random layouts, loads and interrupts with fresh seeds, for SECONDS=600
	@cd tests && PYTHONPATH=$(CURDIR) $(BIN)/python -m fuzz --seconds $(SECONDS) $(ARGS)

.PHONY: lint
lint: setup ## check style and types, change nothing
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/clang-format --dry-run -Werror $(CXX_FILES) $(CXX_TESTS)
	@$(BIN)/mypy

.PHONY: docs
docs: setup ## build the documentation into build/site; a broken link stops it
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

.PHONY: format
format: setup ## put the style right where a tool can
	@$(BIN)/ruff format
	@$(BIN)/ruff check --fix
	@$(BIN)/clang-format -i $(CXX_FILES) $(CXX_TESTS)

.PHONY: bench
bench: setup ## time every provider, at most 10 minutes; results go to bench/results
	@$(BIN)/python -m bench.run --seconds 540 --out bench/results $(ARGS)

# Python itself is not instrumented, so the runtime must be loaded before it; libstdc++ too, or the
# runtime would not find the exception handling that it wraps.
ASAN_RUNTIME = $(foreach lib,libasan.so libubsan.so libstdc++.so,$(shell $(CXX) -print-file-name=$(lib)))
# Python and torch leak at exit by design.
ASAN_SETTINGS := ASAN_OPTIONS=detect_leaks=0:strict_init_order=1 UBSAN_OPTIONS=print_stacktrace=1

# Imports first, so that the tests cannot find another copy. Capturing file descriptors would lose
# the sanitizer's report when it ends the process.
define RUN_SANITIZED
import sys
from pathlib import Path
import torch
import fused_ema._native as native
import pytest
path = Path(native.__file__)
assert Path.cwd() in path.parents, f"not the sanitized package: {path}"
assert b"__asan_init" in path.read_bytes(), f"not sanitized: {path}"
print("Testing", path, flush=True)
sys.exit(pytest.main(["--capture=sys", *sys.argv[1:]]))
endef
export RUN_SANITIZED

# build a sanitized extension with the settings $(1) in the folder $(2), then test it by $(3)
define test_sanitized
	@rm -rf build/$(2)
	@$(call logged,FUSED_EMA_SANITIZE=1 $(1) $(BIN)/python setup.py build --build-lib build/$(2))
	@cd build/$(2) && LD_PRELOAD="$(strip $(ASAN_RUNTIME))" $(ASAN_SETTINGS) PYTHONPATH=$(CURDIR)/build/$(2) \
		$(BIN)/python -c "$$RUN_SANITIZED" $(3)
endef

.PHONY: test-asan
test-asan: setup ## run the tests on an extension built with address and undefined-behaviour sanitizers
	@echo "Building the sanitized extension"
	$(call test_sanitized,,asan,--backends=native $(CURDIR)/tests $(ARGS))

.PHONY: test-shim
test-shim: setup ## run the CUDA plan and kernel as C++ on the CPU through the parity suite, sanitized
	@echo "Building the CUDA kernel for the CPU, sanitized"
	$(call test_sanitized,FUSED_EMA_CUDA_SHIM=1,shim,--backends=shim $(addprefix $(CURDIR)/tests/,\
		test_parity.py test_plans.py test_plans_layouts.py test_gradients.py test_norm.py test_launches.py \
		test_master_weights.py test_device_folding.py \
		$(addprefix test_capturable.py::test_,steps_and_trajectory_match_the_oracle a_replayed_graph_goes_on \
			eager_steps_go_on_after_a_capture a_new_group_leaves_a_graphs_counters_in_place) \
		test_formats.py::test_device_kernels_draw_the_native_bits \
		test_state_format.py::test_device_kernels_draw_the_native_bits test_streams.py))

.PHONY: test-standin
test-standin: ## run tests that need no compiled extension, without one, as on macOS and Windows
	@FUSED_EMA_NO_EXTENSION=1 $(MAKE) --no-print-directory setup
	@FUSED_EMA_NO_EXTENSION=1 $(BIN)/pytest --backends=foreach,reference $(addprefix tests/test_,\
		parity.py any_optimizer.py ema_access.py widest.py) $(ARGS)

PACKAGING_INSTALLED := $(VENV)/.packaging-installed
$(PACKAGING_INSTALLED): $(CONSTRAINTS) pyproject.toml $(TORCH_INSTALLED)
	@$(call logged,$(PIP_INSTALL) --group package)
	@touch $@

.PHONY: package
package: setup $(PACKAGING_INSTALLED) ## build sdist and wheel into dist, and check them
	@rm -rf dist build/lib* build/bdist*
	@$(call logged,$(BIN)/python -m build --no-isolation --sdist --wheel)
	@$(BIN)/twine check --strict dist/*
	@$(BIN)/check-wheel-contents dist/*.whl
	@grep -q '^Repository = ' pyproject.toml || echo "README's links stay relative: pyproject.toml names no Repository"
	@case "$$($(BIN)/python -c 'import sys; print(sys.platform)')" in linux) \
		$(MAKE) --no-print-directory repaired WHEEL="$$(echo dist/*.whl)" INTO=dist/manylinux ;; esac

# What every process has once, from PyTorch, CUDA and the system, stays outside.
AUDITWHEEL ?= $(BIN)/auditwheel
OUTSIDE := libgomp.so.1 libtorch.so libtorch_cpu.so libtorch_cuda.so libtorch_python.so libc10.so libc10_cuda.so libcudart.so.*
WHEEL ?=
INTO ?= dist
.PHONY: repaired
repaired:
	@$(AUDITWHEEL) repair $(foreach lib,$(OUTSIDE),--exclude '$(lib)') --wheel-dir $(INTO) $(WHEEL)

.PHONY: wheels
wheels: ## build a wheel for every Python into dist, by cibuildwheel, which needs Docker on Linux
	@$(PYTHON) -m venv $(VENV)-wheels
	@$(VENV)-wheels/$(notdir $(BIN))/python -m pip install --quiet --upgrade pip
	@$(VENV)-wheels/$(notdir $(BIN))/python -m pip install --quiet --constraint constraints.txt --group wheels
	@$(VENV)-wheels/$(notdir $(BIN))/cibuildwheel --output-dir dist

.PHONY: clean
clean: ## remove what was built and cached, but not the virtual environment
	@rm -rf build dist *.egg-info .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	@rm -f fused_ema/_native*.so
	@find fused_ema kernels tests bench -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
