PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# OpenMP's threads else spin while they wait, which on a machine in use by others costs most of the time.
export OMP_WAIT_POLICY := passive

.DEFAULT_GOAL := help
.PHONY: help demo test lint bench clean

help: ## Print this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

demo: $(VENV)/.installed ## Evaluate the shipped checkpoint with real bitstreams, then train a tiny network
	mkdir -p out
	$(BIN)/python eval.py --data demo --checkpoint mambavc-light-0.0130 \
		--json out/light.json --save-images out/light
	$(BIN)/python -m tools.figures.visual --checkpoint mambavc-light-0.0130 --image demo/test/kodim20.png \
		--output out/comparison.png
	rm -rf out/training
	$(BIN)/python train.py -d demo --N 8 --M 40 --lambda 0.0130 --optimizer muon --schedule cosine \
		--batch-size 4 --patch-size 64 64 --max-steps 100 --val-every 100 --save_path out/training
	$(BIN)/python eval.py --data demo --checkpoint out/training/0.013/checkpoint_best.pth.tar

test: $(VENV)/.installed ## Run the tests
	$(BIN)/python -m pytest -q

lint: $(VENV)/.installed ## Check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(VENV)/.installed ## Time the kernels and the network on this machine
	$(BIN)/python -m tools.benchmark

clean: ## Remove what the other targets made
	rm -rf $(VENV) out

$(VENV)/.installed: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -U pip
	$(BIN)/pip install -q -r requirements-dev.txt
	touch $@
