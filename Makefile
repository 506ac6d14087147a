# Every target sets up what it needs; the stamps make the second time quick.
#   make test                       tests, at every CPU level that this machine has: six minutes on two cores
#   make test-all                   all combinations of options that make test covers in pairs; for the night
#   make bench                      results checked, then measured, a case or two of each kind, in five minutes at most
#   make gates                      what every GPU kernel compiles to, checked and run; needs no GPU; GATES=--quick
#   make demo                       trains a grapheme-to-phoneme model, saves alignment plots
#   make gpu                        on a machine with an NVIDIA GPU: tests and measures, in ten minutes; GPU=--help
#   make gpu-libraries              builds what make gpu needs there into build/gpu, to be carried; needs nvcc
#   make lint | sanitize | wheel | clean
# Overridable: PYTHON (>= 3.10), VENV, TORCH (a pip requirement, >= 2.11).

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
export PIP_DISABLE_PIP_VERSION_CHECK := 1

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
GATES ?=
GPU ?=

BIN := $(VENV)/bin
CXX_FILES := -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh'
SOURCES := setup.py pyproject.toml $(shell find csrc $(CXX_FILES))
TORCH_STAMP := $(VENV)/.torch-$(subst /,-,$(subst =,-,$(subst $() ,-,$(TORCH))))
BUILT := $(VENV)/.built

.PHONY: test test-all bench gates demo gpu gpu-libraries lint sanitize wheel clean
.DELETE_ON_ERROR:

# A worker per core, whose two threads must not spin while they wait.
test test-all gates: export OMP_WAIT_POLICY := passive
test test-all gates: PYTEST_ALONE := $(BIN)/python -m pytest -q
test test-all gates: PYTEST = $(PYTEST_ALONE) --numprocesses auto --maxprocesses 8
test-all: export FUSEDATTN_TESTS := all
test test-all: $(BUILT)
	@echo "== compiling CUDA kernels for the emulator"
	$(BIN)/python tests/build_kernels.py emulator
	$(PYTEST) tests -m "not sanitizers and not compiled"
	@echo "== Triton kernels in Triton's interpreter"
	TRITON_INTERPRET=1 $(PYTEST) -m interpreted $(shell grep -l mark.interpreted tests/test_*.py)
	@echo "== tests of GPUs on a stand-in, which refuses to mix their tensors with the CPU's"
	FUSEDATTN_TEST_DEVICE=standin $(PYTEST) @tests/on_gpus.txt
	@echo "== kernel tests at the lower CPU levels, side by side: a process each"
	@jobs= failed=; \
	for level in $$($(BIN)/python -m fusedattn.info --levels | cut -s -d' ' -f2-); do \
	  FUSEDATTN_TESTS=$${FUSEDATTN_TESTS:-values} FUSEDATTN_CPU_CAPABILITY=$$level $(PYTEST_ALONE) -m levels \
	    $(shell grep -l pytest.mark.levels tests/test_*.py) 2>&1 | sed "s/^/$$level: /" & jobs+=" $$!"; \
	done; \
	for job in $$jobs; do wait "$$job" || failed=yes; done; [[ -z $$failed ]]

bench: $(BUILT)
	$(BIN)/python -m benchmarks --quick

gates: $(BUILT)
	$(BIN)/python -m benchmarks.gates $(GATES)
	@echo "== running what GPU kernels compile to, without a GPU"
	$(BIN)/python tests/build_kernels.py ptx
	$(PYTEST) -m compiled tests/test_ptx_cuda.py tests/test_ptx_kernels.py tests/test_triton_compile.py

demo: $(BUILT)
	$(BIN)/python -m benchmarks.g2p --demo

# With the machine's own torch and no network: nothing is installed.
gpu:
	$(PYTHON) -m benchmarks.gpu $(GPU)

gpu-libraries: $(BUILT)
	$(BIN)/python -m benchmarks.gpu.libraries prepare

lint: $(BUILT)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find csrc examples tests/cuda_emulator tests/aarch64 $(CXX_FILES) | xargs $(BIN)/clang-format --dry-run --Werror

sanitize: $(BUILT)
	PATH="$(abspath $(BIN)):$$PATH" tests/sanitize.sh

# Without what an earlier build left behind, which setuptools would pack again.
wheel: $(BUILT)
	rm -rf build/lib* build/bdist* dist
	$(BIN)/python -m pip wheel --no-build-isolation --no-deps --wheel-dir dist .

clean:
	rm -rf build dist *.egg-info fusedattn/_C*.so $(BUILT)
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(TORCH_STAMP):
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install "setuptools>=77" wheel ninja $(TORCH)
	rm -f $(VENV)/.torch*
	touch $@

# Without build isolation: an isolated build would fetch a second torch, of another version.
$(BUILT): $(TORCH_STAMP) $(SOURCES)
	@echo "== building the extension and installing what tests and benchmarks need (a minute or two)"
	$(BIN)/python -m pip install --no-build-isolation --editable '.[test,bench,gates,dev]' \
	  | sed -u '/^Requirement already satisfied/d'
	touch $@
