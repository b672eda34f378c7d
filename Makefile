# make distill   train a teacher and distil students on real images, from nothing
# make compare   seventeen ways to train a student, each tuned, on the digits (5 minutes; goes on where it was)
# make test      the whole test suite, from nothing; make test-install builds and installs the package as its users do
# make bench     every peer at every size (about 20 minutes); make bench-quick takes about 3
# make gpu-check FOLDER=results   on a machine with a GPU and PYTHON's own torch and Triton: test and measure, 7 minutes
#                PARTS="tests bench" of: build tests sanitize bench train
# make build     compile the extension again after a change under csrc/
# make lint types docs   formatters, type checks, the documentation site
#
# Everything is installed into .venv. PYTHON=python3.12 picks the interpreter; TORCH="torch==2.12.0" the torch to install;
# TORCH= (empty) takes a torch that the interpreter already has.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SOURCES := $(shell find csrc -type f) setup.py $(wildcard tools/*.py)
# Empty, or why the extensions have to be built again although no file is newer.
STALE := $(shell [ ! -e $(VENV)/.ready ] || $(BIN)/python tools/up_to_date.py 2>&1)

.PHONY: FORCE distill compare test test-install test-other-torch bench bench-quick bench-pytest gpu-check build lint types docs docs-serve clean

distill: $(READY)
	$(BIN)/vrm-distill $(ARGS)

compare: $(READY)
	$(BIN)/python -m benchmarks.methods.train $(ARGS)

test: $(VENV)/.adapters $(VENV)/triton-3.6
	$(BIN)/python -m pytest -n $(or $(shell nproc 2>/dev/null),auto) --dist loadgroup $(ARGS)

# Builds and installs the package as its users do: from the source distribution, as a wheel, without a compiler.
test-install: $(READY)
	$(BIN)/python -m pytest -m install tests/install $(ARGS)

# The library that was built beside this torch, beside another: gigabytes, and its tests of parity.
OTHER_TORCH ?= torch==2.14.1 torchvision==0.29.1
test-other-torch: $(READY)
	$(PYTHON) -m venv build/other-torch
	build/other-torch/bin/python -m pip install --quiet $(OTHER_TORCH) "numpy>=2,<2.4" "pytest>=8" "hypothesis>=6.100"
	build/other-torch/bin/python -m pytest tests/parity tests/backends/cpp -k cpp $(ARGS)

bench: $(READY)
	$(BIN)/python -m benchmarks.cpu.run $(ARGS)
	$(BIN)/python -m benchmarks.report.plot
	$(BIN)/python -m benchmarks.report.table
	$(BIN)/python -m benchmarks.report.summary
	$(BIN)/python -m benchmarks.cpu.stages

bench-quick: $(READY)
	$(BIN)/python -m benchmarks.cpu.run --quick $(ARGS)

bench-pytest: $(READY)
	$(BIN)/python -m pytest benchmarks/cpu/test_bench_small.py --benchmark-columns=median,iqr,rounds --benchmark-sort=name $(ARGS)

gpu-check:
	$(PYTHON) -m benchmarks.gpu.check $(or $(FOLDER),$(error give it a folder for the results: make gpu-check FOLDER=results)) $(if $(PARTS),--parts $(PARTS))

build: $(READY)

# An empty TORCH stands for the one that PYTHON has, wherever it has it: a virtual environment's as well.
$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
ifeq ($(TORCH),)
	$(PYTHON) -c "import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1])" \
	    > "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torch.pth"
endif

# Newer than all that was made for another TORCH.
$(VENV)/.torch: $(VENV)/bin/python FORCE
	@echo '$(TORCH)' | cmp -s - $@ || echo '$(TORCH)' > $@

# The extensions need torch's headers: with the torch that is here the build need not be isolated.
$(VENV)/.tools: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(TORCH) "setuptools>=77" ninja
	touch $@

$(READY): $(VENV)/.tools $(SOURCES) $(if $(STALE),FORCE)
	@$(if $(STALE),echo "The extensions are built again: $(STALE)")
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[test,distill,bench]"
	@$(BIN)/python -c "import vrm_kernels; print(vrm_kernels.backends.describe())"
	touch $@

# What the adapters adapt to, what reads exported models, and what judges the detection example. torch is named so that
# none of these libraries replaces it; where they cannot be had, their tests say so and are skipped.
$(VENV)/.adapters: $(READY)
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[test,distill,adapters,onnx]" timm torchdistill pycocotools \
	    "$$($(BIN)/python -c 'import torch; print(f"torch=={torch.__version__}")')" \
	    || echo "The libraries of the adapters, ONNX and pycocotools could not be installed: their tests will be skipped."
	touch $@

# The oldest Triton that is supported, beside the newest: for tests/backends/triton/test_compiled.py alone.
$(VENV)/triton-3.6: $(VENV)/.tools
	$(BIN)/python -m pip install --quiet --no-deps --target $@ "triton==3.6.*" \
	    || echo "Triton 3.6 could not be installed: the tests that compile with it will be skipped."

# What a change must pass besides the tests. The tools are those of the dependency group "dev".
lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(filter %.h %.inl %.cpp %.cu %.cuh,$(SOURCES))

types: $(VENV)/.dev
	$(BIN)/mypy

# The documentation site, into site/; a broken link or an unknown name is an error. docs-serve shows it as it is written.
docs: $(VENV)/.dev
	$(BIN)/python -m mkdocs build --quiet --strict $(ARGS)

docs-serve: $(VENV)/.dev
	$(BIN)/python -m mkdocs serve $(ARGS)

$(VENV)/.dev: $(VENV)/.tools
	$(BIN)/python -m pip install --quiet --group dev
	touch $@

clean:
	rm -rf $(VENV) build site *.egg-info vrm_kernels/_[Cc]*.so vrm_kernels/_build.json
