# Every target sets itself up in .venv; nothing but Python 3.10+ is needed.
PYTHON ?= python3
BIN := .venv/bin
RUN := runs/demo
NOTEBOOKS := 01_install 02_data_prep 03_local_training 04_cluster_training 05_kserve_deploy
HEADLESS := $(shell sed -n 's/^\(opencv-python-headless==[^ ]*\).*/\1/p' requirements.txt)

# The jobs of CI. Every test file is in exactly one of them: what is named nowhere else
# belongs to test-core.
CLUSTER := $(wildcard tests/test_determined_*.py tests/test_ray*.py)
SERVING := $(patsubst %,tests/test_%.py,client engines export faults k8s predictor torchserve)
CORE := $(filter-out $(CLUSTER) $(SERVING),$(wildcard tests/test_*.py))
# Two processes of pytest, because many tests wait for processes of their own. A file
# stays in one of them with its fixtures, and the notebooks, which take longest, begin.
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest --durations=40
PARALLEL := -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: help demo notebooks test test-fast test-core test-cluster test-serving \
  test-notebooks lab lint types bench clean

help:
	@echo "make demo       run the five notebooks in order, results in $(RUN)"
	@echo "make test       all tests, the notebooks among them"
	@echo "make test-fast  without notebooks and servers"
	@echo "make test-core, test-cluster, test-serving, test-notebooks: its parts"
	@echo "make lab        JupyterLab on the notebooks"
	@echo "make lint       ruff"
	@echo "make types      mypy"
	@echo "make notebooks  the outputs of the last demo into notebooks/"
	@echo "make bench      the benchmarks, a minute or a few each"

# sahi drags in opencv-python, which overwrites the headless build: take it out and
# put the headless files back.
.venv/installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "Python 3.10 or newer is needed; set PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import ensurepip' \
	  || { echo "this Python has no venv (on Debian: apt install python3-venv)"; exit 1; }
	@echo "installing into .venv (some minutes, about 6 GB)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --disable-pip-version-check -q -r requirements.txt
	@$(BIN)/python -m pip uninstall --disable-pip-version-check -q -y opencv-python
	@$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps --force-reinstall $(HEADLESS)
	@$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps -e .
	@touch $@

demo: .venv/installed
	@mkdir -p $(RUN)/notebooks
	@for name in $(NOTEBOOKS); do \
	  echo; echo "=== $$name"; \
	  $(BIN)/python -m papermill --cwd notebooks --kernel python3 --stdout-file - \
	    notebooks/$$name.ipynb $(RUN)/notebooks/$$name.ipynb || exit 1; \
	done
	@echo; echo "Done. The executed notebooks: $(RUN)/notebooks; what they made: $(RUN)"

notebooks: .venv/installed
	@$(BIN)/python tests/notebooks/refresh.py $(RUN) notebooks

test: .venv/installed
	@$(PYTEST) $(PARALLEL)

test-fast: .venv/installed
	@$(PYTEST) $(PARALLEL) -m "not slow and not notebook"

test-core: .venv/installed
	@$(PYTEST) $(PARALLEL) $(CORE)

test-cluster: .venv/installed
	@$(PYTEST) $(PARALLEL) $(CLUSTER)

test-serving: .venv/installed
	@$(PYTEST) $(PARALLEL) $(SERVING)

test-notebooks: .venv/installed
	@$(PYTEST) tests/notebooks

lab: .venv/installed
	@$(BIN)/python -m jupyterlab notebooks

lint: .venv/installed
	@$(BIN)/python -m ruff check . && $(BIN)/python -m ruff format --check .

types: .venv/installed
	@$(BIN)/python -m mypy

bench: .venv/installed
	@for script in benchmarks/*.py; do $(BIN)/python $$script --quick || exit 1; done

clean:
	rm -rf runs
