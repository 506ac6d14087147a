# Every target sets up what it needs; the stamps make the second time quick.
#   make test                       tests, at every CPU level that this machine has
#   make bench                      results checked, then measured, in a few minutes
#   make demo                       trains a grapheme-to-phoneme model, saves alignment plots
#   make lint | sanitize | wheel | clean
# Overridable: PYTHON (>= 3.10), VENV, TORCH (a pip requirement, >= 2.11).

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
export PIP_DISABLE_PIP_VERSION_CHECK := 1

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0

BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml $(shell find csrc -name '*.cpp' -o -name '*.h')
TORCH_STAMP := $(VENV)/.torch-$(subst /,-,$(subst =,-,$(subst $() ,-,$(TORCH))))
BUILT := $(VENV)/.built

.PHONY: test bench demo lint sanitize wheel clean
.DELETE_ON_ERROR:

test: $(BUILT)
	$(BIN)/python -m pytest tests
	@echo "== Triton kernels in Triton's interpreter"
	TRITON_INTERPRET=1 $(BIN)/python -m pytest $(wildcard tests/test_triton_*.py)
	@for level in $$($(BIN)/python -m fusedattn.info --levels | cut -s -d' ' -f2-); do \
	  echo "== kernel tests at CPU level $$level"; \
	  FUSEDATTN_CPU_CAPABILITY=$$level $(BIN)/python -m pytest tests -m levels; \
	done

bench: $(BUILT)
	$(BIN)/python -m benchmarks --quick

demo: $(BUILT)
	$(BIN)/python -m benchmarks.g2p --demo

lint: $(BUILT)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	find csrc -name '*.cpp' -o -name '*.h' | xargs $(BIN)/clang-format --dry-run --Werror

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
	$(BIN)/python -m pip install --no-build-isolation --editable '.[test,bench,dev]' \
	  | sed -u '/^Requirement already satisfied/d'
	touch $@
