PYTHON ?= python3
# The versions that were tested, or with LATEST=1 the newest that requirements.txt admits.
LATEST ?= 0
ifeq ($(LATEST),1)
VENV := .venv-latest
PACKAGES := requirements-dev.txt
INSTALL := -r requirements-dev.txt
else
VENV := .venv
PACKAGES := requirements.lock
INSTALL := --require-hashes -r requirements.lock
endif
BIN := $(VENV)/bin

# OpenMP's threads else spin while they wait, which on a machine in use by others costs most of the time.
export OMP_WAIT_POLICY := passive

.DEFAULT_GOAL := help
.PHONY: help demo test lint lock bench clean

help: ## Print this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

# A picture of your own is compared as well: make demo PICTURE=my.jpg
PICTURE ?= demo/test/kodim20.png

demo: $(VENV)/.installed ## Code pictures at five rates, compare, train a checkpoint on for another rate
	mkdir -p out
	$(BIN)/python eval.py --data demo --checkpoint mambavc-light --qualities 0 25 50 75 100 \
		--json out/light.json
	$(BIN)/python -W ignore -m compressai.utils.bench webp demo/test -q 1,30,60,80,90 > out/webp.json
	$(BIN)/python -W ignore -m compressai.utils.bench jpeg demo/test -q 10,40,70,85,95 > out/jpeg.json
	$(BIN)/python -m tools.figures.visual --checkpoint mambavc-light --quality 40 --image "$(PICTURE)" \
		--output out/comparison.png
	rm -rf out/training
	$(BIN)/python train.py -d demo --checkpoint mambavc-light-0.0130 --lambda 0.0035 \
		--optimizer muon --learning-rate 5e-4 --schedule cosine --batch-size 2 --patch-size 128 128 \
		--max-steps 30 --val-every 30 --save-every 30 --log-every 10 -n 0 --save_path out/training
	$(BIN)/python eval.py --data demo --checkpoint out/training/0.0035/checkpoint_best.pth.tar \
		--json out/trained-0.0035.json --save-images out/trained-0.0035
	@echo
	@$(BIN)/python -m tools.points out/light.json out/trained-0.0035.json
	@echo
	@$(BIN)/python -m tools.figures.plot out/jpeg.json --ours out/light.json --anchor out/webp.json \
		--title "Three Kodak pictures" --output out/curve.png
	@echo "out/curve.png has the curve, out/comparison.png $(PICTURE) beside WebP and JPEG."

test: $(VENV)/.installed ## Run the tests
	$(BIN)/python -m pytest -q

lint: $(VENV)/.installed ## Check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(VENV)/.installed ## Time the kernels and the network on this machine
	$(BIN)/python -m tools.benchmark

lock: ## Write requirements.lock anew, with the newest versions (needs uv)
	uv pip compile --quiet --upgrade --universal --python-version 3.10 --generate-hashes \
		requirements-dev.txt --output-file requirements.lock

clean: ## Remove what the other targets made
	rm -rf .venv .venv-latest out

$(VENV)/.installed: requirements.txt requirements-dev.txt $(PACKAGES)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q $(INSTALL)
	touch $@
