# Two commands do everything on a fresh machine: `make demo`, `make test`. See README.md for what must be installed.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# where the CPU build of torch is; the package registry's own build is taken when this is empty or out of reach
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

# what the runtime is built with beside the CPU: --cuda, --vulkan
RUNTIME_FLAGS ?=

# how many tests run side by side, each on its share of the cores
TEST_JOBS ?= 2

# full: five budgets, all methods
BENCH ?= quick

# made out of the bundled model by scripts/train_model.py
MODELS := mixtral8 shared32

# where the patched sources are edited
PATCHED ?= build/llama.cpp

.PHONY: help setup runtime demo test check bench bench-models bench-record bench-runtime bench-gpu \
	patches-apply patches-refresh clean

help:
	@echo "make demo             convert the bundled model in both layouts and compare with llama-quantize"
	@echo "make test             all tests"
	@echo "make check            ruff and mypy"
	@echo "make setup            $(VENV) with pinned dependencies and the patched runtime"
	@echo "make runtime          build (or take from the cache) and install the patched runtime"
	@echo "make bench            compare with llama-quantize and others at equal bytes; BENCH=full: half an hour"
	@echo "make bench-models     one budget of $(MODELS), trained first where models-out/ has none: a quarter of an hour each"
	@echo "make bench-record     put what make bench and bench-models found into benchmarks/, README.md and BENCHMARKS.md"
	@echo "make bench-runtime    measure the runtime's speed against the targets, on a quiet machine"
	@echo "make bench-gpu        measure the kernels' speed on a CUDA device"
	@echo "make patches-apply    unpack the pinned sources into $(PATCHED), one commit per patch, to edit them"
	@echo "make patches-refresh  write the patches anew from the commits there"
	@echo "make clean            remove $(VENV) and what make demo and bench wrote (not the runtime cache)"

$(VENV)/.dependencies: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	@torch=$$(grep '^torch==' constraints.txt); \
	if [ -n "$(TORCH_INDEX)" ]; then \
		$(PIP) install --quiet --no-deps --retries 0 --timeout 20 --index-url $(TORCH_INDEX) "$$torch" \
		|| echo "$(TORCH_INDEX) is out of reach: taking torch from the package registry"; \
	fi
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

runtime: $(VENV)/.dependencies
	$(BIN)/moe2gguf runtime install $(RUNTIME_FLAGS)

setup: runtime

demo: setup
	$(BIN)/moe2gguf demo

# a file's tests share what its first ones make; the runtime's use all cores themselves
test: setup
	$(BIN)/python -m pytest -n $(TEST_JOBS) --dist loadfile --ignore=tests/runtime
	$(BIN)/python -m pytest tests/runtime

# mypy needs the gguf of the runtime's tree, newer than the registry's of the same version
check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	$(BIN)/moe2gguf bench demo $(if $(filter full,$(BENCH)),,--quick)

# the last file that is written
models-out/%/tokenizer_config.json: | $(VENV)/.dependencies
	$(BIN)/python scripts/train_model.py $* models-out

bench-models: setup $(MODELS:%=models-out/%/tokenizer_config.json)
	for model in $(MODELS); do \
		$(BIN)/moe2gguf bench models-out/$$model --quick --bits 2.5 --rounds 1 --folder bench-out/$$model || exit; \
	done

bench-record: $(VENV)/.dependencies
	cp bench-out/bench.json benchmarks/demo.json
	for model in $(MODELS); do \
		[ ! -f bench-out/$$model/bench.json ] || cp bench-out/$$model/bench.json benchmarks/$$model.json || exit; \
	done
	$(BIN)/moe2gguf report benchmarks/demo.json $$(ls benchmarks/*.json | grep -v /demo) \
		--into README.md --into BENCHMARKS.md

bench-runtime: setup
	$(BIN)/python scripts/bench_runtime.py

bench-gpu: $(VENV)/.dependencies
	$(BIN)/python scripts/bench_kernels.py

patches-apply: $(VENV)/.dependencies
	$(BIN)/python scripts/patches-apply $(PATCHED)

patches-refresh: $(VENV)/.dependencies
	$(BIN)/python scripts/patches-refresh $(PATCHED)

clean:
	rm -rf $(VENV) demo-out bench-out
