# Everything on a fresh machine with g++ and Python 3.11 (or `PYTHON=python3.12`): `make demo`, `make test`.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0+cpu
# Its suffix cache finds drafts in earlier text. It comes as source; without a compiler the head drafts alone.
ARCTIC := arctic-inference==0.3.0
# Only used where the configured package index has no CPU build of torch.
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu
STAMP := $(VENV)/.installed
TRITON_STAMP := $(VENV)/.installed-triton

export TOKENIZERS_PARALLELISM := false

.PHONY: setup check-kernel demo test test-fast soak gpu-check lint docs clean

setup: $(STAMP)

$(STAMP): requirements/cpu.lock requirements/ray.lock requirements/vllm-cpu-metadata/pyproject.toml pyproject.toml $(wildcard clover_vllm/attention/cpu/*.cpp clover_vllm/attention/cpu/*.h)
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is not on the PATH; name a Python of 3.11 to 3.13 with PYTHON=..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-deps '$(TORCH)' \
		|| $(BIN)/pip install --quiet --no-deps --index-url $(TORCH_CPU_INDEX) '$(TORCH)'
	$(BIN)/pip install --quiet --no-deps -r requirements/cpu.lock -r requirements/ray.lock
	$(BIN)/pip install --quiet --no-deps --no-build-isolation ./requirements/vllm-cpu-metadata
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/pip install --quiet --no-deps --no-build-isolation '$(ARCTIC)' \
		|| ! command -v $${CXX:-g++} >/dev/null
	$(BIN)/pip install --quiet --no-deps --no-build-isolation -e .
	@$(MAKE) --no-print-directory check-kernel
	touch $@

# GPU kernels are tested in Triton's interpreter.
$(TRITON_STAMP): $(STAMP) requirements/triton.lock
	$(BIN)/pip install --quiet --no-deps -r requirements/triton.lock
	touch $@

# pip goes on where the kernel does not compile. That is meant for machines without a compiler, not to hide an error.
check-kernel:
	@$(BIN)/python -c "from clover_vllm.attention import native_kernel; raise SystemExit(native_kernel() is None)" \
		|| ! command -v $${CXX:-g++} >/dev/null \
		|| { echo "The tree attention kernel was not built although there is a C++ compiler; see why with" \
			"\"$(BIN)/pip install -v --no-deps --no-build-isolation -e .\"."; exit 1; }

demo: setup
	$(BIN)/clover-vllm demo

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

# Tables and the picture from results/*.json.
docs: setup
	$(BIN)/clover-vllm render

# A core for each of two workers; engines and servers stay on their worker's.
PARALLEL := -n 2 --dist loadfile --no-loadscope-reorder

test: lint $(TRITON_STAMP)
	$(BIN)/pytest $(PARALLEL)

# What needs no engine.
test-fast: setup $(TRITON_STAMP)
	$(BIN)/pytest $(PARALLEL) -m 'not server and not engine and not slow'

# The tests of `make test` at full length, for hours.
soak: lint $(TRITON_STAMP)
	CLOVER_TEST_LENGTH=full $(BIN)/pytest $(PARALLEL) --timeout 7200

# On a machine with a GPU and vLLM's CUDA build, in whose environment this package is installed; needs no network.
gpu-check:
	$(or $(wildcard $(BIN)/python),$(PYTHON)) -m clover_vllm.cli gpu-check --output results

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
