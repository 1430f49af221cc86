# Everything here sets itself up: a fresh clone, python >= 3.11 and `make demo` are enough.
PYTHON ?= python3
VENV ?= .venv
NEWEST ?= .venv-newest
OLDEST ?= .venv-oldest
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
DEMO ?= demo_output
TESTS ?=
SHIPPED := smidgen/difflora/generator/embedded
ENV := HF_HUB_OFFLINE=1 OMP_WAIT_POLICY=PASSIVE GOMP_SPINCOUNT=0

.PHONY: demo test test-newest test-oldest test-slow lint types contract docs bench base flow-base wide-base generator wide-generator clean help

help:            ## this list
	@grep -E '^[a-z-]+: .*##|^[a-z-]+:.*  ## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

# Sets up an environment: folder, extras, more words for pip. Its own words are left out, its errors are not.
define set-up
	test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install -qq --upgrade pip
	$(1)/bin/python -m pip install -qq "$(TORCH)" -e ".[$(2)]" $(3)
	touch $@
endef
EXTRAS := all,dev,quantised
comma := ,
DEMO_EXTRAS := diffusion,world
VERSIONS := from importlib.metadata import version as v; \
	print(*(f"{n} {v(n)}" for n in "torch peft transformers diffusers accelerate safetensors numpy".split()), sep="\n")

$(VENV)/.ready: pyproject.toml constraints.txt
	$(call set-up,$(VENV),$(EXTRAS)$(comma)ui,-c constraints.txt)

$(VENV)/.demo: pyproject.toml constraints.txt
	$(call set-up,$(VENV),$(DEMO_EXTRAS),-c constraints.txt)

$(VENV)/.docs: pyproject.toml constraints.txt
	$(call set-up,$(VENV),docs,-c constraints.txt)

$(NEWEST)/.ready: pyproject.toml
	$(call set-up,$(NEWEST),$(EXTRAS)$(comma)ui,--upgrade)

$(OLDEST)/.ready: pyproject.toml constraints-oldest.txt
	$(call set-up,$(OLDEST),$(EXTRAS),-c constraints-oldest.txt)

demo: $(VENV)/.demo  ## draw a person nobody trained on, learn an adapter of a few kilobytes, show what it does
	$(ENV) $(BIN)/smidgen subject $(DEMO)/pictures --seed 7
	$(ENV) $(BIN)/smidgen personalize $(DEMO)/pictures --method svfit --out $(DEMO)/adapter --overwrite
	@echo; echo "Look at $(DEMO)/adapter/contact_sheet.png and $(DEMO)/adapter/loss.png"

test: $(VENV)/.ready  ## all fast tests
	$(ENV) $(BIN)/python -m pytest -n 2

test-newest: $(NEWEST)/.ready  ## the fast tests with the newest versions there are (torch as pinned), in .venv-newest
	@$(NEWEST)/bin/python -c '$(VERSIONS)'
	$(ENV) $(NEWEST)/bin/python -m pytest -n 2 $(TESTS)

test-oldest: $(OLDEST)/.ready  ## the fast tests with the oldest versions allowed (torch as pinned), in .venv-oldest
	@$(OLDEST)/bin/python -c '$(VERSIONS)'
	$(ENV) $(OLDEST)/bin/python -m pytest -n 2 $(TESTS)

test-slow: $(VENV)/.ready  ## the slow ones: real models, peft's own test matrix, twenty kills
	$(ENV) $(BIN)/python -m pytest -m slow

lint: $(VENV)/.ready  ## ruff
	$(BIN)/ruff check . && $(BIN)/ruff format --check smidgen tests benchmarks docsite

types: $(VENV)/.ready  ## mypy
	$(BIN)/mypy

contract: $(VENV)/.ready  ## directions of imports
	$(BIN)/lint-imports

docs: $(VENV)/.docs  ## build the documentation site into build/docs/site; a warning or a broken link fails
	$(ENV) $(BIN)/python -m docsite

bench: $(VENV)/.ready  ## make bench NAME=step_time: redo benchmarks/results/NAME.json
	$(ENV) $(BIN)/python -m benchmarks.$(NAME)

base: $(VENV)/.ready  ## train the embedded base model from nothing (hours; resumable)
	$(ENV) $(BIN)/python -m smidgen.lab.embedded_base --stage all

flow-base: $(VENV)/.ready  ## train the embedded flow base from nothing (an hour; resumable)
	$(ENV) $(BIN)/python -m smidgen.lab.embedded_base --stage render
	$(ENV) $(BIN)/python -m smidgen.lab.embedded_base --stage flow

wide-base: $(VENV)/.ready  ## train the embedded wide base and its judge from nothing (hours; resumable)
	for stage in render judge autoencoder flow; do \
	  $(ENV) $(BIN)/python -m smidgen.lab.embedded_base --world wide --work work/wide_base --stage $$stage || exit 1; done

generator: $(VENV)/.ready  ## train the embedded base's encoders and generator from nothing (an hour and a quarter; resumable)
	$(ENV) $(BIN)/python -m smidgen.lab.embedded_base --stage render
	$(ENV) $(BIN)/python -m smidgen.lab.embedded_base --stage encoders
	$(ENV) $(BIN)/smidgen generator train --out work/generator
	$(ENV) $(BIN)/smidgen generator directions work/generator --people work/generator/people
	$(ENV) $(BIN)/smidgen generator calibrate work/generator --people work/generator/people
	mkdir -p $(SHIPPED)
	cd work/generator && cp -r generator.json network.safetensors codec directions.safetensors reading.safetensors possible.safetensors README.md config.yaml $(CURDIR)/$(SHIPPED)

wide-generator: $(VENV)/.ready  ## train the embedded wide base's encoder and generator from nothing (two hours; resumable)
	$(ENV) $(BIN)/python -m smidgen.lab.embedded_base --stage encoders --world wide --work work/wide_base
	$(ENV) $(BIN)/smidgen generator train --preset wide --out work/wide_generator
	$(ENV) $(BIN)/smidgen generator directions work/wide_generator --people work/wide_generator/people
	$(ENV) $(BIN)/smidgen generator calibrate work/wide_generator --people work/wide_generator/people --most 300
	mkdir -p $(SHIPPED)_wide
	cd work/wide_generator && cp -r generator.json network.safetensors codec directions.safetensors reading.safetensors README.md config.yaml $(CURDIR)/$(SHIPPED)_wide

clean:           ## the environments and what the demo wrote
	rm -rf $(VENV) $(NEWEST) $(OLDEST) $(DEMO)
