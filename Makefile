# `make serve` on a fresh machine: own virtual environment, torch, this package, the demo model, the server.
# Every step leaves a stamp in .venv, so that the second run does nothing twice.

TORCH      ?= torch==2.13.0
TORCH_ARGS ?=
PYTHON     ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
                $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done || echo python3)
CONFIG     ?= configs/smollm2-cpu.yaml
ARGS       ?=
GPU_PYTHON ?= python3
GPU_WHEELS ?= .whl
OUT        ?= results/gpu

VENV := .venv
BIN  := $(VENV)/bin
PIP  := $(BIN)/python -m pip --disable-pip-version-check
CODE := tfserve tests benchmarks examples

# LiteLLM, LangChain and Ray pull packages back to versions that dev's do not want. So they have an environment of their
# own, which sees the other one's packages behind its own: torch is there only once.
CLIENTS := .venv-clients
NODE    := build/node

# A killed install can leave a package that pip takes for whole. `.installing` is there while pip works, with the process id
# of its make: found without that process, the environment cannot be trusted and is made again.
define install
	@echo $$PPID > $(VENV)/.installing
	@$(PIP) install $(1) || { rm -f $(VENV)/.installing; exit 1; }
	@rm -f $(VENV)/.installing
endef

.DEFAULT_GOAL := help
.PHONY: help serve demo test test-all check format gpu-check gpu-wheels clean discard-interrupted

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1 @/' | column -t -s @
	@echo 'Variables: PYTHON, TORCH ($(TORCH)), TORCH_ARGS (more pip arguments for torch), CONFIG ($(CONFIG)), ARGS'

serve: $(VENV)/.stamp-run demo  ## install, prepare the demo model, serve it on http://127.0.0.1:8000
	@exec $(BIN)/tfserve serve $(CONFIG) $(ARGS)

demo: $(VENV)/.stamp-run  ## download and convert the demo model into the user's cache
	@$(BIN)/tfserve demo-model

test: $(VENV)/.stamp-dev demo  ## run the tests that take seconds
	$(BIN)/pytest -m 'not slow' $(ARGS)

test-all: $(VENV)/.stamp-browser $(CLIENTS)/.stamp $(NODE)/.stamp demo  ## run every test: also browser, Node, LiteLLM, LangChain, Ray, chaos, wheel
	@status=0; $(BIN)/pytest $(ARGS) || status=1; \
	$(CLIENTS)/bin/python -m pytest tests/clients tests/examples $(ARGS) || status=1; exit $$status

check: $(VENV)/.stamp-dev  ## format, lint and types
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/ruff check $(CODE)
	$(BIN)/mypy

format: $(VENV)/.stamp-dev  ## format the code and fix what lint can fix
	$(BIN)/ruff format $(CODE)
	$(BIN)/ruff check --fix $(CODE)

# A GPU machine need not have a network, nor this project's environment: it runs under its own Python, and what that lacks
# comes along as wheels in $(GPU_WHEELS) (ignored by git; `make gpu-wheels` fetches those that are on the package index).
gpu-check:  ## on a machine with a GPU: run tests/gpu, then measure (docs/performance.md); needs no network
	@GPU_PYTHON=$(GPU_PYTHON) GPU_WHEELS=$(GPU_WHEELS) OUT=$(OUT) benchmarks/gpu_check.sh $(ARGS)

gpu-wheels:  ## fetch what `make gpu-check` needs on a bare machine with Python 3.12 (flash-attn: bring its wheel yourself)
	@mkdir -p $(GPU_WHEELS)
	@rm -f $(GPU_WHEELS)/msgspec-*.whl $(GPU_WHEELS)/pytest_asyncio-*.whl
	@$(GPU_PYTHON) -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
	  $(addprefix --platform manylinux,_2_28_x86_64 _2_17_x86_64 2014_x86_64) -d $(GPU_WHEELS) msgspec pytest-asyncio

clean:  ## remove the environment and every cache in this directory (the demo model stays)
	rm -rf $(VENV) $(CLIENTS) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +

ifneq ($(wildcard $(VENV)/.installing),)
$(VENV)/.stamp-torch: discard-interrupted
endif

discard-interrupted:
	@maker=$$(cat $(VENV)/.installing 2>/dev/null); if [ -n "$$maker" ] && kill -0 "$$maker" 2>/dev/null; then \
	  echo "Another make (process $$maker) is installing into $(VENV); wait for it to end." >&2; exit 1; fi
	@echo 'An earlier install was interrupted: starting over.'
	@rm -rf $(VENV)

$(VENV)/.stamp-torch: Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "tfserve needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.11" >&2; exit 1; }
	@mkdir -p $(VENV) && echo $$PPID > $(VENV)/.installing
	@[ -x $(BIN)/python ] && $(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(call install,$(TORCH_ARGS) '$(TORCH)')
	@$(BIN)/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > $(VENV)/constraints.txt
	@touch $@

# The constraint keeps every later dependency from bringing another torch.
$(VENV)/.stamp-run: $(VENV)/.stamp-torch pyproject.toml
	$(call install,--constraint $(VENV)/constraints.txt --editable '.[gguf]')
	@touch $@

$(VENV)/.stamp-dev: $(VENV)/.stamp-run pyproject.toml
	$(call install,--constraint $(VENV)/constraints.txt --editable '.[dev]')
	@touch $@

# The browser itself is the system's (Debian: apt install chromium); without one those tests say why they are skipped.
$(VENV)/.stamp-browser: $(VENV)/.stamp-dev
	$(call install,--constraint $(VENV)/constraints.txt --editable '.[browser]')
	@touch $@

# pip is renewed first: Python 3.11's own downloads LiteLLM release by release, 40 MB each, until one fits.
$(CLIENTS)/.stamp: $(VENV)/.stamp-dev pyproject.toml
	@rm -rf $(CLIENTS) && $(BIN)/python -m venv $(CLIENTS)
	@$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  > "$$($(CLIENTS)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/dev.pth"
	$(CLIENTS)/bin/python -m pip install --quiet --upgrade pip
	$(CLIENTS)/bin/python -m pip --disable-pip-version-check install --constraint $(VENV)/constraints.txt --editable '.[clients,ray]'
	@touch $@

$(NODE)/.stamp: tests/clients/node/package.json
	@mkdir -p $(NODE) && cp $< $(NODE)
	@if command -v npm >/dev/null; then npm install --prefix $(NODE) --no-audit --no-fund --loglevel=error; \
	  else echo 'No npm: the JavaScript client will not be tested.' >&2; fi
	@touch $@
