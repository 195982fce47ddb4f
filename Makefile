# `make` lists the targets. Each of them first makes .venv and installs what is needed, if it is not there yet.
# Another Python: make test PYTHON=python3.12.  Options of the command: make reproduce ARGS="--help".
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# The stamp is written last and holds the folder's path. Without it the installation was interrupted; with another path the
# folder was moved or copied, and its scripts point at the old place. Both start anew, as does another Python that is asked for.
ifneq ($(shell cat $(STAMP) 2>/dev/null),$(CURDIR))
ANEW := yes
else ifeq ($(origin PYTHON),command line)
ifneq ($(shell $(PYTHON) -V 2>&1),$(shell $(BIN)/python -V 2>&1))
ANEW := yes
endif
endif
ifdef ANEW
CLEAR := --clear
.PHONY: $(STAMP)
endif

.PHONY: help reproduce ablations test lab check readme lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' Makefile

reproduce: $(STAMP) ## the paper's tables and figures at demo scale, one seed (20 minutes on 2 cores, installation included): writes results/
	$(BIN)/megl reproduce $(ARGS)

ablations: $(STAMP) ## the experiments beyond the paper, one seed (40 minutes on 2 cores after make reproduce, whose runs it shares): writes results/
	$(BIN)/megl ablations $(ARGS)

test: $(STAMP) ## run every notebook in a real kernel, and the rules of the repository
	$(BIN)/python -m pytest -n 2 --dist worksteal --durations 5 tests $(ARGS)

check: $(STAMP) ## the rules of the repository alone (half a minute): export, clean, lint, parameters, README
	$(BIN)/python -m pytest tests/test_repository.py $(ARGS)

lab: $(STAMP) ## open the notebooks in JupyterLab
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/jupyter lab --notebook-dir=. --LabApp.default_url=/lab/tree/nbs/index.ipynb $(ARGS)

readme: $(STAMP) ## write README.md from nbs/index.ipynb
	$(BIN)/python tools/readme.py

lock: $(STAMP) ## write requirements.lock from what is installed
	$(BIN)/python tools/lock.py

clean: ## remove the environment, caches and built pages, but neither data/ nor results/
	rm -rf $(VENV) _docs _proc build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find nbs megl tests tools -name __pycache__ -o -name .ipynb_checkpoints | xargs rm -rf

$(STAMP): settings.ini requirements.lock setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "megl needs Python 3.11 or newer, and $(PYTHON) is not: try  make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@echo "Installing into $(VENV): once, a few minutes"
	@rm -f $@
	$(PYTHON) -m venv $(CLEAR) $(VENV)
	$(BIN)/python -m pip install -r requirements.lock
	$(BIN)/python -m pip install --no-deps -e .
	@echo "$(CURDIR)" > $@
