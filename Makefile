# make demo   set up, then plan and run a Llama on 4 local processes next to eager PyTorch
# make test   set up, then run the tests
# make lint   types, style, direction of imports
# make bench  every benchmark, in short; fails when a target is missed
# make cluster-bench  real plans on emulated hosts next to their prediction (root; some minutes)
# make plan-bench  weft's plans against DDP, FSDP2 and DTensor on emulated hosts (root; some minutes)

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: demo test lint setup bench cluster-bench plan-bench clean

setup: $(STAMP)

# torch first and alone: a range would admit a build with gigabytes of CUDA.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup
	$(BIN)/python -m examples.demo --out demo-out

test: setup
	OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal

lint: setup
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup
	status=0; for file in $$(grep -l '^from rows import .*finish' benchmarks/*.py); do \
	  echo $$file; $(BIN)/python $$file --quick || status=1; done; exit $$status

cluster-bench: setup
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/cluster/bench.py --plans

plan-bench: setup
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/cluster/plan_bench.py

clean:
	rm -rf $(VENV) out demo-out build dist *.egg-info src/*.egg-info
