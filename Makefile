# make quickstart is the first run; make help lists the rest. Another Python: make PYTHON=python3.12 quickstart
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
INSTALL := $(RUN) -m pip install -qq --disable-pip-version-check -c constraints.txt
QUICKSTART := output/quickstart_digits/default
TOUR := output/quickstart_digits/tour

.PHONY: help quickstart tour studies test lint faults clean

help:
	@echo "make quickstart   train and evaluate a small Strip-MLP on handwritten digits (CPU, about three minutes)"
	@echo "make tour         then use the digits' checkpoint: predict, report, figures, export (another minute or two)"
	@echo "make studies      list the commands behind docs/RESULTS.md; with CIFAR10=FOLDER CALTECH101=FOLDER, repeat them (hours)"
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

$(QUICKSTART)/checkpoint_best.pth: | $(VENV)/.installed
	@$(MAKE) --no-print-directory quickstart

tour: $(VENV)/.installed-extra $(QUICKSTART)/checkpoint_best.pth
	@echo "Twelve digits that training has not seen, as files:"
	@$(RUN) -c "from PIL import Image; import numpy as np, os; \
	  from data import build_dataset; from utils.config import load_config; os.makedirs('$(TOUR)/digits', exist_ok=True); \
	  source = build_dataset(load_config('configs/quickstart_digits.yaml'), is_train=False).source; \
	  [Image.fromarray(np.asarray(source.load(i))).save(f'$(TOUR)/digits/{i:02}.png') for i in range(12)]"
	$(RUN) tools/predict.py $(QUICKSTART)/checkpoint_best.pth $(TOUR)/digits --top 2 --sheet $(TOUR)/sheet.png
	$(RUN) tools/report.py $(QUICKSTART)/checkpoint_best.pth --output $(TOUR)/report
	$(RUN) tools/visualize.py $(QUICKSTART)/checkpoint_best.pth --show erf cam strips --output $(TOUR)/figures
	$(RUN) tools/export.py $(QUICKSTART)/checkpoint_best.pth --format onnx --output $(TOUR)/digits.onnx
	$(RUN) tools/export.py $(QUICKSTART)/checkpoint_best.pth --format safetensors --output $(TOUR)/model
	@echo
	@echo "Names for images      $(TOUR)/sheet.png"
	@echo "What goes wrong       $(TOUR)/report/report.html (open it in a browser)"
	@echo "What training saw     $(QUICKSTART)/batch.png"
	@echo "What the network sees $(TOUR)/figures/erf.png, cam.png, strip_weights.png, position_tables.png"
	@echo "For other programs    $(TOUR)/digits.onnx, $(TOUR)/model (safetensors)"
	@echo "Each of these tools is described in docs/TOOLS.md"

studies: $(VENV)/.installed-extra
	@OMP_NUM_THREADS=1 $(RUN) tools/studies.py $(if $(CIFAR10)$(CALTECH101),run,list) \
	  $(if $(CIFAR10),--data cifar10=$(CIFAR10)) $(if $(CALTECH101),--data caltech101=$(CALTECH101))

test: lint
	@$(RUN) -m pytest

lint: $(VENV)/.installed-dev
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .

faults: $(VENV)/.installed-dev
	@$(RUN) -m pytest -m "faults or not faults" tests/faults tests/data/test_shards.py tests/checkpoint/test_hostile_files.py tests/runtime/test_agreement.py tests/training/test_planning.py tests/models/test_resample.py tests/models/test_inference.py tests/tools/test_export_and_visualize.py tests/tools/test_scaling.py

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

$(VENV)/.installed-extra: $(VENV)/.installed requirements-extra.txt
	@echo "Installing the optional packages ..."
	@$(INSTALL) -r requirements-extra.txt
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed-extra
	@echo "Installing the tools for tests ..."
	@$(INSTALL) pytest ruff
	@touch $@
