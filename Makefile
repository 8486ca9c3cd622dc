PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo test lint bench clean

help: ## Print this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

demo: $(VENV)/.installed ## Train a small network on the shipped pictures, evaluate it with real bitstreams
	rm -rf out/demo
	$(BIN)/python train.py -d demo --N 8 --M 40 --lambda 0.0130 --optimizer muon --schedule cosine \
		--batch-size 4 --patch-size 64 64 --max-steps 200 --val-every 200 --save_path out/demo
	$(BIN)/python eval.py --data demo --checkpoint out/demo/0.013/checkpoint_best.pth.tar \
		--json out/demo/results.json --save-images out/demo/pictures

test: $(VENV)/.installed ## Run the tests
	$(BIN)/python -m pytest -q

lint: $(VENV)/.installed ## Check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(VENV)/.installed ## Time the kernels and the network on this machine
	$(BIN)/python benchmark.py

clean: ## Remove what the other targets made
	rm -rf $(VENV) runs out

$(VENV)/.installed: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -U pip
	$(BIN)/pip install -q -r requirements-dev.txt
	touch $@
