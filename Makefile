# Everything is installed into .venv; nothing else on the machine is touched but, by root, for Chromium (see below).
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin
EXTRAS ?= cu13,train,serve,test
SEED ?= 0
SLIDES ?=
LABELS ?=
# Tests by file, one file on each core.
SPREAD := -n logical --maxprocesses 8 --dist loadfile
# With a seed of its own each demo has a folder of its own; the same command again starts the training anew.
DEMO := out/demo-seed$(SEED)$(if $(SLIDES),-own,)

# The page's tests drive a real browser; it is the one thing that comes from the system, and only where that may be.
CHROMIUM := { test $$(id -u) = 0 && command -v apt-get && apt-get update && apt-get install -y --no-install-recommends chromium; } >/dev/null 2>&1
NO_CHROMIUM := the tests of the page will skip: there is no Chromium, and only root may install it (apt-get install chromium)

.PHONY: setup demo test quick lint bench torture clean

setup: $(VENV)/ready

$(VENV)/ready: pyproject.toml constraints.txt
	@test -x $(RUN)/python || $(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet --constraint constraints.txt --editable ".[$(EXTRAS)]"
ifneq ($(findstring test,$(EXTRAS)),)
	@command -v chromium chromium-browser google-chrome >/dev/null || $(CHROMIUM) || echo "$(NO_CHROMIUM)" >&2
endif
	@touch $@

demo: setup
	@test -z "$(SLIDES)" -o -n "$(LABELS)" || { echo "make demo SLIDES=… needs LABELS=…, a CSV with slide_id,label" >&2; exit 2; }
	@rm -rf $(DEMO)/run
ifeq ($(SLIDES),)
	$(RUN)/slidegrad synth --out $(DEMO)/cohort --slides 120 --seed $(SEED)
	$(RUN)/slidegrad tile $(DEMO)/cohort/slides --out $(DEMO)/manifests --tile-px 32 --mpp 2.0
	$(RUN)/slidegrad train demo --manifests $(DEMO)/manifests --labels $(DEMO)/cohort/labels.csv --out $(DEMO)/run --seed $(SEED) --nproc 3
else
	$(RUN)/slidegrad tile "$(SLIDES)" --out $(DEMO)/manifests --tile-px 32 --mpp 2.0 || test $$? -eq 1
	$(RUN)/slidegrad train demo --manifests $(DEMO)/manifests --labels "$(LABELS)" --out $(DEMO)/run --seed $(SEED) --nproc 3
endif
	@echo "report: $(abspath $(DEMO)/run/report.html)" >&2

test: setup
	$(RUN)/python -m pytest $(SPREAD)

quick: setup
	$(RUN)/python -m pytest $(SPREAD) -m "not slow"

lint: setup
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy
	$(RUN)/lint-imports

bench: setup
	@for file in tests/benchmarks/bench_*.py; do echo "== $$file" >&2; $(RUN)/python -m tests.benchmarks.$$(basename $$file .py) || exit 1; done

torture: setup
	$(RUN)/python -m pytest --full-counts -m torture -rA --timeout 14400

clean:
	rm -rf $(VENV) out build *.egg-info
