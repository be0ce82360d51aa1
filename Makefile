# make test    make the virtual environment, build in place, run the tests
# make train   train a small language model over two pipeline ranks (about two minutes)
# make lint    ruff, mypy, clang-format
# make docs    the documentation in build/site, warnings as errors (seconds; needs no build)
# make sanitize   the C++ runtime's own tests under ASan, UBSan and TSan (two minutes)
# make wheel-check   make the wheel from the build, run it where there is only torch
# make cuda-check   compile the CUDA build against torch 2.14 and run the tutorial with it on the CPU
# make gpu OUT=folder   build, check and measure on a GPU: python3 with torch and CUDA, nvcc, ninja; under nine minutes
SHELL := /bin/bash

VENV := .venv
PYTHON := $(VENV)/bin/python
# torch's CPU build on the disk is for Python 3.11.
SYSTEM_PYTHON ?= $(shell command -v python3.11 || command -v python3)
MAX_JOBS ?= 2
TRAIN_FLAGS ?=
# On a GPU machine, which may have no network: the Python that has torch. GPU_FLAGS="--device sim" is a dry run.
PYTHON_GPU ?= python3
GPU_FLAGS ?=

export MAX_JOBS
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Each rank is one process a core; more threads only fight each other.
export OMP_NUM_THREADS := 1

.PHONY: all venv build test train lint format docs sanitize wheel-check cuda-check gpu clean
all: build

venv: $(VENV)/made

# The stamp is written last, so that an interrupted install is begun again.
# The .pth file makes the checkout importable: no second, slower build through pip.
$(VENV)/made: requirements-dev.txt
	@echo "making the environment in $(VENV): a minute or two"
	@$(SYSTEM_PYTHON) -m venv $(VENV)
	@$(PYTHON) -m pip install -qq --requirement requirements-dev.txt
	@$(PYTHON) -c "import pathlib, sysconfig; pathlib.Path(sysconfig.get_paths()['purelib'], 'pp_runtime_checkout.pth').write_text('$(CURDIR)\n')"
	@touch $@

# Shows which file of how many is compiled; all that the compiler says is in the log, which a failure names.
BUILD_LOG := build/build.log
build: $(VENV)/made
	@mkdir -p build; \
	$(PYTHON) setup.py --quiet build_ext --inplace 2>&1 | tee $(BUILD_LOG) | \
	sed -un 's|^\(\[[0-9]*/[0-9]*\]\).* -c \(-c \)*[^ ]*/csrc/\([^ ]*\) .*|building \1 csrc/\3|p'; \
	if [ $${PIPESTATUS[0]} -ne 0 ]; then \
	    grep -m 20 -E '(error|undefined reference).*:' $(BUILD_LOG) | grep -v ' -c ' || tail -n 15 $(BUILD_LOG); echo "the build failed; all that it said: $(BUILD_LOG)" >&2; exit 1; \
	fi

test: build
	@$(PYTHON) -m pytest $(TEST_FLAGS)

train: build
	@$(PYTHON) -m torch.distributed.run --standalone --nproc_per_node 2 examples/train_lm.py --output runs/train $(TRAIN_FLAGS)

# All checks run, also after one has failed.
lint: $(VENV)/made
	@failed=0; \
	check() { echo "$$@"; "$$@" || failed=1; }; \
	check $(VENV)/bin/ruff check .; \
	check $(VENV)/bin/ruff format --check .; \
	check $(VENV)/bin/mypy; \
	echo clang-format --dry-run csrc tests/native tests/async_device; \
	find csrc tests/native tests/async_device -name '*.cpp' -o -name '*.h' -o -name '*.cu' | xargs -r $(VENV)/bin/clang-format --dry-run -Werror || failed=1; \
	exit $$failed

format: $(VENV)/made
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	find csrc tests/native tests/async_device -name '*.cpp' -o -name '*.h' -o -name '*.cu' | xargs -r $(VENV)/bin/clang-format -i

docs:
	@SYSTEM_PYTHON=$(SYSTEM_PYTHON) .ci/docs

sanitize: $(VENV)/made
	$(PYTHON) tests/native/sanitize.py

wheel-check: build
	.ci/wheel-check

cuda-check:
	.ci/cuda-check

# nproc goes by OMP_NUM_THREADS, which is one here.
gpu:
	@MAX_JOBS=$$(env -u OMP_NUM_THREADS nproc) $(PYTHON_GPU) -m benchmarks.gpu $(if $(OUT),--out "$(OUT)") $(GPU_FLAGS)

clean:
	rm -rf build pp_runtime/*.so pp_runtime/_build_info.py
