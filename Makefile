# Everything happens in .venv; `make help` lists what there is.
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
# The second distribution: models of other media than pictures.
MEDIA := ./distributions/media

# One thread per test worker: two workers with all threads each are slower than one. A file is one worker's, for what its
# tests share is made once per worker.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all weights lint house docs docs-serve

help: ## List the targets.
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */\1\t/' | expand -t 12

setup: $(READY) ## Create .venv and install twostep with everything that its tests and its site need.

$(READY): pyproject.toml constraints.txt $(MEDIA)/pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "twostep needs Python 3.11 or newer, this is $$($(PYTHON) -V); try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,docs]' -e $(MEDIA)
	@touch $@

demo: setup ## Draw a gallery with the two-step student beside its teacher, and time them.
	$(BIN)/python examples/gallery.py

test: setup ## Run the tests that take minutes, in two processes.
	$(PYTEST) -m "not slow"

test-all: setup ## Run every test, the slow ones too, and last those that need the machine's memory alone.
	$(PYTEST) -m "not alone"
	$(BIN)/python -m pytest -m alone

weights: ## Put the results of `twostep distill nano` and `nano-lora`, under runs/, into the package.
	cp -r runs/nano/model/. twostep/weights/nano/
	cp runs/nano-lora/model/students/*_lora.safetensors twostep/weights/nano/students/
	rm -f twostep/weights/nano/students/*_32step_unet.safetensors

lint: setup ## Check style, types, and who imports whom.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

house: setup ## Show how large each room is and how many files import it.
	$(BIN)/python benchmarks/house.py

docs: setup ## Build the site, with search and the API reference, into site/.
	$(BIN)/mkdocs build --strict

docs-serve: setup ## Show the site at http://127.0.0.1:8000 and build it again at every change.
	$(BIN)/mkdocs serve --strict
