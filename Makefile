# The front door. Everything here is thin over `python -m anytime`; `make help` lists it.
PYTHON ?= python3
VENV   ?= .venv
EXP    ?= quickstart
FORMAT ?= md,csv,tex
JOBS   ?= 1
RESULTS ?= results
BIN    := $(VENV)/bin
ANYTIME := $(BIN)/python -m anytime
# FORCE=0 is no, and what is said in words may hold quotes and brackets.
on      = $(filter-out 0 no false,$(1))
quoted  = '$(subst ','\'',$(1))'
COMMON := $(if $(SET),--set $(call quoted,$(SET))) --results '$(RESULTS)' $(if $(call on,$(DEBUG)),--debug)
SAYS   := $(if $(call on,$(QUIET)),--quiet) $(if $(call on,$(JSON)),--json)

.DEFAULT_GOAL := help
.PHONY: help exp list report compare cite measure board-emulated export zoo clean-cache install test check format bench smoke notebooks

help: ## show this
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'
	@echo '  variables: EXP=$(EXP) SET="recipe.epochs=1 train_seeds=(0,)" FORCE=1 JOBS=1 FORMAT=$(FORMAT) RESULTS=$(RESULTS) DEBUG=1 QUIET=1 JSON=1'

# torch first and by its exact pin: pip then finds the CPU build where there is one beside it.
$(BIN)/.installed: setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo 'anytime needs Python 3.11 or newer: make PYTHON=python3.11 ...'; exit 2; }
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q torch==2.13.0
	$(BIN)/pip install -q -e .
	@touch $@

$(BIN)/.installed-test: $(BIN)/.installed
	$(BIN)/pip install -q -e '.[test]'
	@touch $@

$(BIN)/.installed-boards: $(BIN)/.installed
	$(BIN)/pip install -q -e '.[boards]'
	@touch $@

install: $(BIN)/.installed ## make .venv and install into it

exp: $(BIN)/.installed ## run what EXP lacks, write and print its table
	@$(ANYTIME) run '$(EXP)' $(COMMON) --format '$(FORMAT)' --jobs $(JOBS) $(if $(call on,$(FORCE)),--force) $(if $(ONLY),--only $(call quoted,$(ONLY))) $(SAYS)

list: $(BIN)/.installed ## what EXP asks for: todo, done, skip and why, fail
	@$(ANYTIME) list '$(EXP)' $(COMMON) $(if $(call on,$(JSON)),--json)

report: $(BIN)/.installed ## write EXP's tables and figures from its records
	@$(ANYTIME) report '$(EXP)' $(COMMON) --format '$(FORMAT)' $(SAYS)

compare: $(BIN)/.installed ## A beside B (experiments, or folders of results); fails if B is worse; TOLERANCE="accuracy=0.3 size_bytes=1.02"
	@$(ANYTIME) compare '$(A)' '$(B)' --results '$(RESULTS)' $(foreach t,$(TOLERANCE),--tolerance '$(t)') $(SAYS)

cite: $(BIN)/.installed ## print the sources of what EXP uses
	@$(ANYTIME) cite '$(EXP)' $(COMMON) $(if $(call on,$(JSON)),--json)

measure: $(BIN)/.installed-boards ## measure EXP on BOARD (a file of experiments/boards/, or several), training nothing again
	@$(ANYTIME) measure '$(EXP)' --board $(BOARD) $(COMMON) --format '$(FORMAT)' $(SAYS)

board-emulated: $(BIN)/.installed-boards ## answers of an emulated aarch64 board; root, network, about 10 minutes; not in CI
	scripts/board_emulated.sh $(BIN)/python

export: $(BIN)/.installed ## write the network CELL (a key, or EXP and words of its row) to TO; POLICY= BUDGET= SINGLE=1
	@$(ANYTIME) export $(call quoted,$(CELL)) --to '$(TO)' $(COMMON) $(if $(POLICY),--policy '$(POLICY)') $(if $(BUDGET),--budget $(BUDGET)) $(if $(call on,$(SINGLE)),--single-file) $(if $(call on,$(QUIET)),--quiet)

notebooks: $(BIN)/.installed-test ## execute the notebooks and write what they give
	$(BIN)/python notebooks/execute.py

zoo: $(BIN)/.installed ## keep the networks that EXP has trained in results/zoo; ONLY="words or key" the one of that row
	@$(ANYTIME) zoo '$(EXP)' $(COMMON) $(if $(ONLY),--only $(call quoted,$(ONLY)))

clean-cache: $(BIN)/.installed ## say how large the cache is; YES=1 deletes it
	@$(ANYTIME) clean-cache --results '$(RESULTS)' $(if $(call on,$(YES)),--yes)

test: $(BIN)/.installed-test ## install what tests need, and run them
	$(BIN)/python -m pytest -n auto --dist loadfile $(ARGS)

check: $(BIN)/.installed-test ## ruff, mypy, and every table and figure again from the records, as CI runs them
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(ANYTIME) report --check

format: $(BIN)/.installed-test ## sort imports and format
	$(BIN)/ruff check -q --fix --select I .
	$(BIN)/ruff format -q .

smoke: $(BIN)/.installed ## a short run of every experiment, into a folder of its own
	.ci/smoke $(BIN)/python

bench: $(BIN)/.installed-test ## the benchmarks
	for b in $(filter-out benchmarks/keep.py,$(wildcard benchmarks/*.py)); do $(BIN)/python $$b || exit 1; done
