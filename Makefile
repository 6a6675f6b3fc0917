# Everything here installs into .venv; nothing else on the machine is touched. `make demo` and `make test` need only
# Python 3.11 or newer with pip, make, and a C compiler where a package has no wheel for the machine. With a C++
# compiler they build the CPU kernels as well.

PYTHON  = python3 python3.14 python3.13 python3.12 python3.11# the first usable one
BACKEND := $(shell if [ "$$(uname)" = Darwin ]; then echo metal; elif nvidia-smi -L >/dev/null 2>&1; then echo cuda; else echo cpu; fi)
MODEL   = smollm2-135m
PROMPT  = Why is the sky blue? Answer in three sentences.

CXX    ?= c++

VENV   = .venv
BIN    = $(VENV)/bin
READY  = $(VENV)/.$(BACKEND)
EXTRA  = $(if $(filter metal,$(BACKEND)),,$(BACKEND:cpu=mlx-cpu),)# macOS needs none: MLX comes with Metal there
# After the installation of MLX, whose headers the kernels need, so not a prerequisite
USE_KERNELS = $(if $(filter cpu,$(BACKEND)),@$(MAKE) --no-print-directory $(VENV)/.kernels)
USABLE = import ensurepip, platform, sys, venv; \
         sys.exit(sys.version_info < (3, 11) or (sys.platform, platform.machine()) == ("darwin", "x86_64"))

.PHONY: help demo test kernels lint types layers wheel check clean

help:
	@echo "make demo    fetch SmolLM2-135M-Instruct, quantize it to 8 bits and let it answer"
	@echo "make test    run the test suite"
	@echo "make kernels build the CPU kernels, which make MLX some ten times faster on a CPU"
	@echo "make check   what else a change must pass: lint, types, layers, wheel (each is a target too)"
	@echo "make clean   remove .venv and all that was built; models stay ('mlxarch list', 'mlxarch rm')"
	@echo "Settings: PYTHON=python3.12  BACKEND=cpu|cuda|metal (now $(BACKEND))  MODEL=NAME  PROMPT='...'"

demo: $(READY)-gguf
	$(USE_KERNELS)
	$(BIN)/mlxarch pull $(MODEL) --bits 8 --no-eval --yes </dev/null
	$(BIN)/mlxarch run $(MODEL) --bits 8 --stats --seed 0 --max-tokens 200 "$(PROMPT)" </dev/null

# What dev brings is enough for the suite. Each of its processes has a core: more threads would only wait for each other.
test: $(firstword $(wildcard $(READY)-dev) $(READY)-test)
	$(USE_KERNELS)
	OMP_NUM_THREADS=1 MLXARCH_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

# For MLX's CPU back end, see docs/cpu.md. Tries again where an earlier build failed.
kernels: $(firstword $(wildcard $(READY)-*) $(READY)-gguf)
	@grep -qs built $(VENV)/.kernels || rm -f $(VENV)/.kernels
	@$(MAKE) --no-print-directory $(VENV)/.kernels

lint: $(READY)-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)-dev
	$(BIN)/pyright

layers: $(READY)-dev
	PYTHONPATH=. $(BIN)/lint-imports --no-cache --no-logo

# setuptools would pack what an earlier build left in build/.
wheel: $(READY)-dev
	rm -rf build dist
	@$(BIN)/python -m build --wheel --outdir dist . >$(VENV)/build.log 2>&1 || { cat $(VENV)/build.log >&2; exit 1; }
	$(BIN)/python .ci/check_wheel.py dist/*.whl
	$(BIN)/python benchmarks/install_size.py dist/*.whl

check: lint types layers wheel

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis

# One stamp per set of extras, so that a second call starts at once. pip speaks only where it fails.
$(READY)-%: pyproject.toml | $(VENV)/.created
	@echo "Installing mlxarch and what it needs into $(VENV) (MLX back end: $(BACKEND)); once, about a minute"
	@$(BIN)/python -m pip install --editable ".[$(EXTRA)$*]" >$(VENV)/pip.log 2>&1 || { cat $(VENV)/pip.log >&2; exit 1; }
	@touch $@

# Optional: without a compiler, without its packages, or with an MLX that it does not fit, everything works without it.
# The stamp is written in any case, so that a second call starts at once.
$(VENV)/.kernels: $(wildcard native/src/*) native/setup.py native/pyproject.toml | $(VENV)/.created
	@echo none >$@
	@rm -rf native/build # objects there do not follow headers
	@if ! echo '#include <version>' | $(CXX) -std=c++20 -x c++ -fsyntax-only - 2>/dev/null; then \
	    echo "No C++20 compiler ($(CXX)): going on without the CPU kernels, slower"; exit 0; \
	fi; \
	echo "Building the CPU kernels (once, about a minute)"; \
	if { $(BIN)/python -m pip install "setuptools>=77" "nanobind>=3.1,<3.2" && \
	    CXX="$(CXX)" $(BIN)/python -m pip install --no-build-isolation --no-deps --force-reinstall ./native; } \
	    >$(VENV)/kernels.log 2>&1; then \
	    echo built >$@; \
	else \
	    echo "The CPU kernels cannot be built: going on without them, slower. The reason is at the end of" \
	        "$(VENV)/kernels.log"; \
	fi

$(VENV)/.created:
	@for python in $(BIN)/python $(PYTHON); do \
	    if $$python -c '$(USABLE)' >/dev/null 2>&1; then $$python -m venv $(VENV) && touch $@; exit; fi; \
	done; \
	echo "No usable Python among: $(PYTHON)" >&2; \
	echo "mlxarch needs Python 3.11 or newer with venv and pip (Debian and Ubuntu: apt-get install python3-venv), on a" >&2; \
	echo "Mac an arm64 one. Name it: make $(or $(MAKECMDGOALS),test) PYTHON=/path/to/python3" >&2; \
	exit 1
