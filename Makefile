# make quickstart is the first run; make help lists the rest. Another Python: make PYTHON=python3.12 quickstart
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
INSTALL := $(RUN) -m pip install -qq --disable-pip-version-check -c constraints.txt
QUICKSTART := output/quickstart_digits/default

.PHONY: help quickstart test lint faults clean

help:
	@echo "make quickstart   train and evaluate a small Strip-MLP on handwritten digits (CPU, about three minutes)"
	@echo "make test         ruff and pytest"
	@echo "make lint         ruff alone"
	@echo "make faults       the long fault-injection tests too: killed processes, full disks, damaged files"
	@echo "make clean        remove $(VENV) and caches; runs in output/ stay"

quickstart: $(VENV)/.installed
	@OMP_NUM_THREADS=1 $(RUN) main.py --cfg configs/quickstart_digits.yaml --output output
	@OMP_NUM_THREADS=1 $(RUN) main_eval.py --cfg configs/quickstart_digits.yaml --output output --resume $(QUICKSTART)/checkpoint_best.pth
	@echo
	@$(RUN) -c "import json; r = json.load(open('$(QUICKSTART)/eval.json')); \
	  print(f\"Accuracy    {r['acc1']:.2f} % of {r['num_samples']} digits that training has not seen\")"
	@echo "Curves      $(QUICKSTART)/curves.png"
	@echo "Checkpoint  $(QUICKSTART)/checkpoint_best.pth"

test: lint
	@$(RUN) -m pytest

lint: $(VENV)/.installed-dev
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .

faults: $(VENV)/.installed-dev
	@$(RUN) -m pytest -m "faults or not faults" tests/faults tests/checkpoint/test_hostile_files.py tests/models/test_resample.py

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(VENV)/.installed: requirements.txt constraints.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || \
	  { echo "Python 3.11 or newer is needed, $$($(PYTHON) --version) was found; name one: make PYTHON=python3.12"; exit 1; }
	@echo "Making $(VENV) and installing PyTorch and the other requirements; this takes a few minutes ..."
	@$(PYTHON) -m venv $(VENV)
	@$(INSTALL) -r requirements.txt
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed requirements-extra.txt
	@echo "Installing the tools for tests and the optional packages ..."
	@$(INSTALL) -r requirements-extra.txt pytest ruff
	@touch $@
