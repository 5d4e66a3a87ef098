# Every target sets itself up in .venv; nothing but Python 3.10+ is needed.
PYTHON ?= python3
BIN := .venv/bin
RUN := runs/demo
NOTEBOOKS := 01_install 02_data_prep 03_local_training 04_cluster_training 05_kserve_deploy
HEADLESS := $(shell sed -n 's/^\(opencv-python-headless==[^ ]*\).*/\1/p' requirements.txt)

.PHONY: demo notebooks test test-fast lab lint bench clean

help:
	@echo "make demo       run the five notebooks in order, results in $(RUN)"
	@echo "make test       all tests, the notebooks among them"
	@echo "make test-fast  without notebooks and servers"
	@echo "make lab        JupyterLab on the notebooks"
	@echo "make lint       ruff"
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
	@$(BIN)/python -m pytest

test-fast: .venv/installed
	@$(BIN)/python -m pytest -m "not slow and not notebook"

lab: .venv/installed
	@$(BIN)/python -m jupyterlab notebooks

lint: .venv/installed
	@$(BIN)/python -m ruff check . && $(BIN)/python -m ruff format --check .

bench: .venv/installed
	@for script in benchmarks/*.py; do $(BIN)/python $$script --quick || exit 1; done

clean:
	rm -rf runs
