# make demo: the main job on an embedded pipeline.   make test: the tests.   Both make .venv when it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test lint clean

demo: $(READY)
	$(BIN)/quantdm demo

test: $(READY) lint
	@echo "== tests (about 10 minutes on two cores) =="
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE GOMP_SPINCOUNT=0 $(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(READY)
	@echo "== ruff, pyright =="
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# torch is pinned by constraints.txt: a looser request would pull gigabytes of CUDA wheels.
$(READY): pyproject.toml constraints.txt
	@echo "== setting up $(VENV) (once, about two minutes) =="
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "quantdm needs Python 3.11 or newer; try: make PYTHON=python3.12"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $(READY)

clean:
	rm -rf $(VENV) runs build dist
