# make distill   everything from text to an evaluated ternary student (CONFIG=configs/demo.toml)
# make test      the tests
CONFIG ?= configs/demo.toml
FORMAT ?= gguf
ARGS ?=
PYTHON ?= python3
PIP_ARGS ?=
VENV ?= .venv

BIN := $(VENV)/bin
TRISTILL := $(BIN)/tristill
RUN := $(TRISTILL) run --config $(CONFIG) $(ARGS) --until

.PHONY: teacher dump-logits distill evaluate export sweep report test test-slow check format docs bench

# The steps. Each runs all steps before it that are not up to date.
teacher dump-logits distill evaluate: $(VENV)/.installed
	$(RUN) $@

# The student as another program reads it, checked there: FORMAT=gguf, hf or bitnet.
export: $(VENV)/.installed-export
	$(RUN) distill
	$(TRISTILL) export --config $(CONFIG) $(ARGS) --format $(FORMAT)

# Many students of one cache, which is made first if it is not there: CONFIG=configs/sweeps/NAME.toml
sweep: CONFIG = configs/sweeps/demo.toml
sweep: $(VENV)/.installed-sweep
	$(TRISTILL) sweep --config $(CONFIG) $(ARGS) --make-cache

# The run as one page, report.html in its folder.
report: $(VENV)/.installed-report
	$(RUN) distill
	$(TRISTILL) report --config $(CONFIG) $(ARGS)

# Two at a time, with one thread of torch each, and files split as little as can be, since their fixtures are slow;
# then those that want the machine for themselves.
test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal -m 'not slow and not alone' $(ARGS)
	OMP_NUM_THREADS=1 $(BIN)/pytest -m 'alone and not slow' $(ARGS)

test-slow: $(VENV)/.installed-dev
	$(BIN)/pytest -m slow $(ARGS)

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	mkdir -p $(VENV)/tree/tristill
	for folder in cache stages pipeline configs; do ln -sfn ../../../$$folder $(VENV)/tree/tristill/$$folder; done
	MYPYPATH=$(VENV)/tree $(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Writes docs/cli.md, docs/config.md and the tables of README.md anew.
docs: $(VENV)/.installed-dev
	$(BIN)/python -m tristill.pipeline.reference

# Some eight hours on two cores; cache_fidelity and hidden_fidelity want the runs of the demo and of benchmarks/second.toml.
bench: $(VENV)/.installed-dev
	$(BIN)/pip install --quiet $(PIP_ARGS) --constraint constraints.txt --editable '.[bench]'
	$(BIN)/python -m benchmarks.demo
	$(TRISTILL) run --config benchmarks/second.toml --run-dir runs/second
	$(BIN)/python -m benchmarks.dump_speed
	$(BIN)/python -m benchmarks.cache_fidelity
	$(BIN)/python -m benchmarks.hidden_fidelity
	$(BIN)/python -m benchmarks.cache_students
	$(BIN)/python -m benchmarks.distill_speed
	$(BIN)/pip install --quiet $(PIP_ARGS) --no-deps --requirement benchmarks/peers.txt
	$(BIN)/python -m benchmarks.reader_speed
	$(BIN)/python -m benchmarks.order_quality
	$(BIN)/python -m benchmarks.soak
	$(BIN)/python -m benchmarks.scale
	$(BIN)/python -m benchmarks.loss_memory
	$(BIN)/python -m benchmarks.step_speed
	$(BIN)/python -m benchmarks.deployment
	$(BIN)/python -m benchmarks.methods
	$(BIN)/python -m benchmarks.recipe
	$(BIN)/python -m benchmarks.plan_accuracy

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(PIP_ARGS) --constraint constraints.txt --editable .
	touch $@

$(VENV)/.installed-export: $(VENV)/.installed
	$(BIN)/pip install --quiet $(PIP_ARGS) --constraint constraints.txt --editable '.[hf,gguf]'
	touch $@

$(VENV)/.installed-report: $(VENV)/.installed
	$(BIN)/pip install --quiet $(PIP_ARGS) --constraint constraints.txt --editable '.[report]'
	touch $@

$(VENV)/.installed-sweep: $(VENV)/.installed
	$(BIN)/pip install --quiet $(PIP_ARGS) --constraint constraints.txt --editable '.[sweep]'
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install --quiet $(PIP_ARGS) --constraint constraints.txt --editable '.[dev,hf,gguf,sweep,report,tensorboard,remote]'
	touch $@
