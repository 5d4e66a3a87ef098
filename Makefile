# Every target sets itself up in .venv; nothing but Python 3.10 to 3.13 is needed.
PYTHON ?= python3
BIN := .venv/bin
RUN := runs/demo
NOTEBOOKS := 01_install 02_data_prep 03_local_training 04_cluster_training 05_kserve_deploy
# Which PyTorch: empty for PyPI's; cpu for the build without CUDA, from TORCH_INDEX.
# .venv/installed holds the answer, so that .venv stays with it.
HELD := $(shell cat .venv/installed 2>/dev/null)
TORCH := $(HELD)
TORCH_INDEX :=
pin = $(shell sed -n 's/^\($(1)==[^ ]*\).*/\1/p' requirements.txt)
UV := $(shell uv --version >/dev/null 2>&1 && echo uv || echo $(BIN)/uv)

# The jobs of CI. Every test file is in exactly one of them: what is named nowhere else
# belongs to test-core.
CLUSTER := $(wildcard tests/test_determined_*.py tests/test_ray*.py)
SERVING := $(patsubst %,tests/test_%.py,client cluster engines export faults k8s predictor \
  rollout serve_benchmark torchserve try)
CORE := $(filter-out $(CLUSTER) $(SERVING),$(wildcard tests/test_*.py))
# Two processes of pytest, because many tests wait for processes of their own. A file
# stays in one of them with its fixtures, and the notebooks, which take longest, begin.
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest --durations=40
PARALLEL := -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: help demo own notebooks test test-fast test-core test-cluster test-serving \
  test-notebooks lab site try lint lock types bench clean venv another

help:
	@echo "make demo       run the five notebooks in order, results in $(RUN)"
	@echo "make venv       the environment alone, in .venv"
	@echo "make own        the notebook on real pictures, results in runs/crowns"
	@echo "make test       all tests, the notebooks among them"
	@echo "make test-fast  without notebooks and servers"
	@echo "make test-core, test-cluster, test-serving, test-notebooks: its parts"
	@echo "make lab        JupyterLab on the notebooks; LAB='--ip=0.0.0.0' in a container"
	@echo "make try        a page to try the demo's detector, or SERVER=http://..."
	@echo "make site       notebooks, helpers and benchmarks as web pages, in runs/site"
	@echo "make lint       ruff"
	@echo "make lock       the lock files anew from requirements.txt"
	@echo "make types      mypy"
	@echo "make notebooks  the outputs of the last demo into notebooks/"
	@echo "make bench      the benchmarks, a minute or a few each"

define python
@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' \
  || { echo "Python 3.10 to 3.13 is needed; set PYTHON=/path/to/python3"; exit 1; }
endef

# pip is the last that venv writes: a .venv without it is not whole
define venv
@test -x $(BIN)/pip || $(PYTHON) -c 'import ensurepip' 2>/dev/null \
  || { echo "this Python has no venv (on Debian: apt install python3-venv)"; exit 1; }
@test -x $(BIN)/pip || $(PYTHON) -m venv .venv
endef

PIP := $(BIN)/python -m pip --disable-pip-version-check install -q
INTO := -q --python $(BIN)/python

# Checks come first: a lock that does not fit installs nothing.
.venv/installed: requirements.txt requirements.lock pyproject.toml
	$(python)
	@$(PYTHON) .ci/lock.py check
	@case "$(TORCH):$(TORCH_INDEX)" in :*|cpu:?*) ;; \
	  cpu:) echo "TORCH=cpu needs TORCH_INDEX, the address of PyTorch's index for CPUs"; exit 1 ;; \
	  *) echo "TORCH=$(TORCH) is unknown: leave it out, or TORCH=cpu"; exit 1 ;; esac
	$(venv)
	@echo "installing into .venv (a minute or two; 7 GB, 4 of them CUDA)"
	@test $(UV) = uv || $(PIP) $(call pin,uv)
ifeq ($(TORCH),cpu)
	@$(UV) pip sync $(INTO) --require-hashes requirements-without-torch.lock
	@$(UV) pip install $(INTO) --no-deps --default-index "$(TORCH_INDEX)" \
	  $(call pin,torch) $(call pin,torchvision)
else
	@$(UV) pip sync $(INTO) --require-hashes requirements.lock
endif
	@$(UV) pip install $(INTO) --no-deps --no-build-isolation -e .
	@echo "$(TORCH)" > $@

venv: .venv/installed

ifneq ($(TORCH),$(HELD))
.venv/installed: another
endif

# Renews the lock files where requirements.txt asks for it; UPGRADE=1 takes the newest
# of everything that is not pinned there.
lock:
	$(python)
	$(venv)
	@$(PIP) $(call pin,uv)
	@$(BIN)/python .ci/lock.py write $(if $(UPGRADE),--upgrade)

demo: .venv/installed
	@mkdir -p $(RUN)/notebooks
	@for name in $(NOTEBOOKS); do \
	  echo; echo "=== $$name"; \
	  $(BIN)/python -m papermill --cwd notebooks --kernel python3 --stdout-file - \
	    notebooks/$$name.ipynb $(RUN)/notebooks/$$name.ipynb || exit 1; \
	done
	@echo; echo "Done. The executed notebooks: $(RUN)/notebooks; what they made: $(RUN)"

own:
	@$(MAKE) --no-print-directory demo RUN=runs/crowns NOTEBOOKS=your_own_data

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

# The first notebook, and its headings beside it: a layout that JupyterLab goes on with
# under this name. As root, as in NVIDIA's container, it starts only if told to.
LAYOUT := runs/lab/default-37a8.jupyterlab-workspace
lab: .venv/installed
	@mkdir -p runs/lab
	@test -e $(LAYOUT) || cp .ci/lab.jupyterlab-workspace $(LAYOUT)
	@$(BIN)/python -m jupyterlab notebooks --LabApp.workspaces_dir="$(CURDIR)/runs/lab" \
	  --LabApp.default_url=/lab/tree/01_install.ipynb \
	  $(if $(filter 0,$(shell id -u)),--allow-root) $(LAB)

# Without SERVER the detector of the last demo is served here. The scene to try it on
# is drawn from a seed that nothing was trained on.
ARTEFACT := $(RUN)/serving/artefact
TRY := $(if $(SERVER),--server "$(SERVER)",--artefact "$(ARTEFACT)")
try: .venv/installed
	@test -n "$(SERVER)" || test -d "$(ARTEFACT)" || { echo "there is no $(ARTEFACT):" \
	  "run make demo first, or make try SERVER=http://HOST:PORT"; exit 1; }
	@$(BIN)/python -m sample_data --output_dir runs/try --scenes 1 --seed 7 >/dev/null
	@cp runs/try/train_images/5.tif runs/try/another_town.tif
	@$(BIN)/python -m kserve_utils.try_page $(TRY) --examples runs/try/another_town.tif \
	  $(firstword $(wildcard $(RUN)/tiles/val_images*/*.jpg))

# With SITE_REPOSITORY=https://github.com/OWNER/NAME pages have links to edit and open.
site: .venv/installed
	@mkdir -p runs/site-build/source
	@$(BIN)/python -m sphinx -q -W --keep-going -c docs -d runs/site-build/doctrees \
	  runs/site-build/source runs/site
	@echo "Done: runs/site/index.html"

lint: .venv/installed
	@$(BIN)/python -m ruff check . && $(BIN)/python -m ruff format --check .

types: .venv/installed
	@$(BIN)/python -m mypy

bench: .venv/installed
	@for script in benchmarks/*.py; do $(BIN)/python $$script --quick || exit 1; done

clean:
	rm -rf runs
