# `make` lists the targets. Everything but `make gpu` runs in .venv, which is made on first use from requirements/.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help demo demo-qlora test compile sanitize gpu gpu-report fuzz peft-judge integrations bench tune lint readme clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(VENV)/demo  ## fine-tune two adapters on a real model, serve 32; writes out/demo/
	$(BIN)/python -m lora_kernels demo

demo-qlora: $(VENV)/demo  ## the same model with its base in 4 bits, against bf16; writes out/demo-qlora/
	$(BIN)/python -m lora_kernels demo --qlora

test: $(VENV)/dev  ## every test that needs no GPU: the interpreter, then the cross-compiler
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not compile and not gpu and not integration"
	$(BIN)/python -m pytest -m compile

compile: $(VENV)/dev  ## the static gate alone: cross-compile every kernel and read the machine code
	$(BIN)/python -m lora_kernels compile

SANITIZERS := -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g
CSRC_TESTS := tests/test_csrc.py tests/test_cpu_base.py tests/test_cpu_training.py tests/test_cpu_dequantize.py tests/test_batched.py tests/test_functional.py

sanitize: $(VENV)/dev  ## the compiled CPU kernels under the address and undefined-behaviour sanitizers
	@set -e; python=$$(realpath -s $(BIN)/python); copy=$$(mktemp -d); trap 'rm -rf $$copy' EXIT; \
	cp -r csrc lora_kernels tests setup.py pyproject.toml README.md LICENSE $$copy; cd $$copy; rm -f lora_kernels/*.so; \
	CXX="g++ $(SANITIZERS)" LORA_KERNELS_BUILD=cpu $$python setup.py -q build_ext --inplace; \
	set -x; LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" PYTHONPATH=. \
	ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 $$python -m pytest -q --capture=sys $(CSRC_TESTS) \
	  -k "(cpu or isa or set or thread or company) and not wheel and not builds"

# PYTHON as it is where its torch sees the GPU, else that of .venv.
define on_gpu
	@sees_gpu='import sys, torch; ok = torch.cuda.is_available() or "--dry-run" in "$(ARGS)"; sys.exit(None if ok else "make $@: torch sees no GPU here")'; \
	python=$(PYTHON); \
	$$python -c "import pytest; $$sees_gpu" 2>/dev/null \
	  || { $(MAKE) --no-print-directory $(VENV)/dev && python=$(BIN)/python && $$python -c "$$sees_gpu"; } || exit; \
	set -x; $$python setup.py -q build_ext --inplace; PYTHONPATH=. $(1)
endef

gpu:  ## every test on the local GPU; uses PYTHON as it is where its torch sees the GPU
	$(call on_gpu,LORA_KERNELS_TEST_DEVICE=cuda $$python -m pytest -m "not compile")

gpu-report:  ## what a first run on a GPU has to settle, in 25 minutes; writes out/gpu-report/; ARGS=--dry-run needs none
	$(call on_gpu,$$python -m benchmarks.gpu_report $(ARGS))

tune:  ## search for the fastest tiles and strategies on the local GPU; ARGS="--minutes 60"
	$(call on_gpu,$$python -m benchmarks.tune $(ARGS))

fuzz: $(VENV)/dev  ## 2,000 random problems, and 10,000 orders of programs
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz.py --n 2000
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz.py --orders 10000

peft-judge: $(VENV)/judge  ## PEFT's own LoRA tests with and without us, every fused call and gradient compared
	PYTHONPATH=. $(BIN)/python tests/peft_judge $(VENV)/peft-*.tar.gz --work out/peft-judge

ENGINES := tests/test_sglang.py tests/test_vllm.py  # in a process of their own: they stand in for modules, or change them
integrations: $(VENV)/integrations $(VENV)/demo  ## the stacks that make test goes without: trainers, engines, sharding, other LoRA layers
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m integration $(ENGINES:%=--ignore=%)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m integration $(ENGINES)

bench: $(VENV)/dev  ## every suite against every rival that is installed; writes benchmarks/results/, plots to out/bench/
	$(BIN)/python -m lora_kernels bench

lint: $(VENV)/dev  ## ruff, rules and format
	$(BIN)/ruff check
	$(BIN)/ruff format --check

readme: $(VENV)/dev  ## regenerate the tables of README.md and docs/, and the plots of docs/benchmarks.md
	PYTHONPATH=. $(BIN)/python tests/support_table.py

clean:  ## remove what the targets above made
	rm -rf $(VENV) build dist out *.egg-info .pytest_cache .ruff_cache .hypothesis

$(VENV)/dev: requirements/torch.txt requirements/triton.txt requirements/cuda.txt requirements/dev.txt pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
# First: a torch for CUDA brings the runtime that it wants.
	$(PIP) --no-deps -r requirements/cuda.txt
	$(PIP) -r requirements/torch.txt
	$(PIP) -c requirements/torch.txt -r requirements/dev.txt
# Last and alone: torch asks for a triton of its own, and would get it back.
	$(PIP) --no-deps -r requirements/triton.txt
	$(PIP) --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/judge: $(VENV)/dev requirements/judge.txt
	$(PIP) -c requirements/torch.txt -c requirements/dev.txt -r requirements/judge.txt
	$(PIP) --no-deps -r requirements/triton.txt
	$(BIN)/python -m pip download --quiet --no-deps --no-build-isolation --no-binary peft --dest $(VENV) \
	  "$$(grep ^peft== requirements/dev.txt)"
	@touch $@

$(VENV)/integrations: $(VENV)/dev requirements/integrations.txt requirements/engines.txt
	$(PIP) -c requirements/torch.txt -c requirements/dev.txt -r requirements/integrations.txt
	$(PIP) --no-deps -r requirements/triton.txt
	$(PIP) --no-deps -r requirements/engines.txt
	@touch $@

$(VENV)/demo: $(VENV)/dev requirements/demo.txt
	$(PIP) --no-deps -r requirements/demo.txt
	@touch $@
