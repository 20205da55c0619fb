# One task, one command: `make help`. Every task sets up what it needs first and does nothing twice.
#
# PYTHON=python3.12      which Python the virtual environment is made from
# VENV=none              use $(PYTHON) as it is, with the packages it has, and build in place: no network needed
# TORCH_INDEX=URL        one more place to take torch from, such as torch's own index of builds without the CUDA libraries

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
PYTEST_FLAGS ?=
FUZZ_SECONDS ?= 30

PACKAGES := torch numpy setuptools wheel pytest hypothesis matplotlib tqdm ruff mypy nvidia-cuda-nvrtc
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)

ifeq ($(VENV),none)
  PY := $(PYTHON)
  BUILT := build/.built-in-place
else
  PY := $(VENV)/bin/python
  BUILT := $(VENV)/.built
endif
export PYTHONPATH := $(CURDIR)
export MPLBACKEND := Agg

.DEFAULT_GOAL := help
.PHONY: help build demo test bench-cpu bench-host lint lint-c lint-python format sanitize wheel clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1|\2/' | column -t -s '|'

# ---- set-up ----------------------------------------------------------------------------------------------------------------

$(VENV)/.packages: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or later is needed; choose one with PYTHON=...")'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --disable-pip-version-check $(addprefix --extra-index-url ,$(TORCH_INDEX)) \
	  -c constraints.txt $(PACKAGES)
	touch $@

$(VENV)/.built: $(VENV)/.packages $(SOURCES)
	$(PY) -m pip install --disable-pip-version-check --no-build-isolation --no-deps -e .
	touch $@

build/.built-in-place: $(SOURCES)
	$(PY) setup.py -q build_ext --inplace
	mkdir -p build && touch $@

build: $(BUILT) ## build the extension

# ---- what a user runs ------------------------------------------------------------------------------------------------------

demo: $(BUILT) ## train a small GPT with torch's attention and with ours; writes demo.png
	$(PY) examples/demo.py

test: $(BUILT) ## the whole test suite
	$(PY) -m pytest tests -q $(PYTEST_FLAGS)

bench-cpu: $(BUILT) ## ours against torch on this CPU; writes benchmarks/results/cpu.json and cpu.png
	$(PY) benchmarks/bench.py cpu

bench-host: $(BUILT) ## what one call costs before any work; writes benchmarks/results/host.json
	$(PY) benchmarks/bench.py host

wheel: $(BUILT) ## a wheel in dist/ with compiled GPU kernels inside; ARCHS=sm_80,sm_90a chooses, ARCHS=none leaves them out
	rm -rf flash_attn_c/cubins
	test "$(ARCHS)" = none || $(PY) -m flash_attn_c prebuild $(addprefix --arch ,$(ARCHS)) --out flash_attn_c/cubins
	$(PY) -m pip wheel --disable-pip-version-check --no-build-isolation --no-deps -w dist .
	@ls -l dist

# ---- checks ----------------------------------------------------------------------------------------------------------------

C_SOURCES = $(shell find csrc tests/c examples -name '*.c')
C_STYLED = $(shell find csrc tests examples -name '*.[ch]' -o -name '*.cu')
C_FLAGS = -std=c11 -DPy_LIMITED_API=0x030A0000 -Wall -Wextra -Werror -I. -Icsrc \
  -I$(shell $(PY) -c 'import sysconfig; print(sysconfig.get_path("include"))')

lint: lint-c lint-python ## gcc and clang with warnings as errors, clang-format, cppcheck, ruff, mypy

lint-c: $(BUILT)
	echo $(C_SOURCES) | xargs -n 1 -P 2 gcc $(C_FLAGS) -O2 -c -o /dev/null
	echo $(C_SOURCES) | xargs -n 1 -P 2 clang $(C_FLAGS) -fsyntax-only
	clang-format --dry-run -Werror $(C_STYLED)
	cppcheck -q -j 2 --std=c11 --enable=warning,performance,portability --inline-suppr --suppress=missingReturn --error-exitcode=1 -I. -Icsrc $(C_SOURCES)

lint-python: $(BUILT)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(BUILT) ## rewrite sources in the project's style
	clang-format -i $(C_STYLED)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

# The core with no Python, its C tests, the C example and a short fuzz run, all under AddressSanitizer and UndefinedBehaviorSanitizer.
SANITIZED := build/sanitize
SANITIZE_FLAGS := -std=gnu11 -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -I.
CORE_OBJECTS := $(patsubst %.c,$(SANITIZED)/%.o,$(wildcard csrc/core/*.c csrc/cpu/*.c csrc/cuda/*.c csrc/cuda/store/*.c)) \
  $(SANITIZED)/build/embedded_sources.o
HEADERS := $(shell find csrc tests/c -name '*.h' -o -name '*.def')

sanitize: $(BUILT) ## the core under address and undefined-behaviour sanitizers: C tests, C example, FUZZ_SECONDS seconds of fuzzing
	$(PY) setup.py -q embed
	$(MAKE) --no-print-directory -j 2 $(addprefix $(SANITIZED)/,core_tests attention fuzz)
	$(SANITIZED)/attention
	$(SANITIZED)/fuzz $(FUZZ_SECONDS)
	$(SANITIZED)/core_tests

$(SANITIZED)/%.o: %.c $(HEADERS)
	@mkdir -p $(@D)
	gcc $(SANITIZE_FLAGS) -c $< -o $@

$(SANITIZED)/core_tests: $(CORE_OBJECTS) $(patsubst %.c,$(SANITIZED)/%.o,$(wildcard tests/c/core_tests.c tests/c/test_*.c))
$(SANITIZED)/attention: $(CORE_OBJECTS) $(SANITIZED)/examples/attention.o
$(SANITIZED)/fuzz: $(CORE_OBJECTS) $(SANITIZED)/tests/c/fuzz.o
$(SANITIZED)/core_tests $(SANITIZED)/attention $(SANITIZED)/fuzz:
	gcc $(SANITIZE_FLAGS) $^ -lm -lpthread -ldl -o $@

clean: ## remove everything that make made
	rm -rf .venv build dist *.egg-info demo.png flash_attn_c/*.so flash_attn_c/cubins
	find . -name __pycache__ -prune -exec rm -rf {} +
