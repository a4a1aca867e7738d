# make demo: the main job on an embedded pipeline.   make test: the tests.   Both make .venv when it is missing, from
# requirements.lock.   make lock: write that anew, with the newest versions that pyproject.toml allows.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip --disable-pip-version-check
LOCKED := --quiet -c requirements.lock
CHECK_PYTHON = $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
  { echo "quantdm needs Python 3.11 or newer, $(PYTHON) is not; try: make PYTHON=python3.12"; exit 1; }

.PHONY: demo test lint lock clean

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

# The build backend comes first and from the lock too: an isolated build would fetch the newest one.
$(READY): pyproject.toml requirements.lock
	@$(CHECK_PYTHON)
	@echo "== setting up $(VENV) from requirements.lock (once, about two minutes) =="
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install $(LOCKED) hatchling editables
	$(PIP) install $(LOCKED) --no-build-isolation -e '.[test]'
	@touch $(READY)

lock:
	@$(CHECK_PYTHON)
	$(PYTHON) eval/lock.py

clean:
	rm -rf $(VENV) runs build dist
