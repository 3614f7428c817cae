# `make serve` on a fresh machine: own virtual environment, torch, this package, the demo model, the server.
# Every step leaves a stamp in .venv, so that the second run does nothing twice. All versions are those in locks/, but for
# torch and what depends on its build (TORCH).

TORCH      ?= torch==2.13.0
TORCH_ARGS ?=
PYTHON     ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
                $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done || echo python3)
CONFIG     ?= configs/smollm2-cpu.yaml
ARGS       ?=
OLDEST_PYTHON ?= python3.11
GPU_PYTHON ?= python3
GPU_WHEELS ?= .whl
OUT        ?= results/gpu

VENV := .venv
BIN  := $(VENV)/bin
CODE := tfserve tests benchmarks examples

# LiteLLM, LangChain and Ray hold packages back to versions that dev's need not keep to. So they have an environment of
# their own, which sees the other one's packages behind its own: torch is there only once.
CLIENTS := .venv-clients
NODE    := build/node

# Environments of `make lock`, `make test-newest` and `make test-oldest`; the latter two are made anew by every run.
LOCKER := .venv-lock
NEWEST := .venv-newest
OLDEST := .venv-oldest

LOCK         := locks/main.txt
CLIENTS_LOCK := locks/clients.txt

# What is installed, in variables: a comma would end an argument of $(call).
RUN_EXTRAS     := .[gguf,grammar]
CLIENTS_EXTRAS := .[clients,ray,convert-tokenizer]
LOCKED_EXTRAS  := dev browser lock

# Arguments: an environment, a constraints file. The two variables hold build backends to it as well: pip before 25.3 looks
# at the first when it builds, later ones at the second.
pip     = $(1)/bin/python -m pip --disable-pip-version-check
locked  = PIP_CONSTRAINT=$(2) PIP_BUILD_CONSTRAINT=$(2) $(call pip,$(1))
compile = $(LOCKER)/bin/uv pip compile --quiet --custom-compile-command 'make lock' --no-emit-index-url \
            --annotation-style line --constraint build/locks/torch.txt

# Left out of the locks: torch and what its builds differ in.
not_torch = grep -vE '^(torch|triton|nvidia-[a-z0-9-]+|cuda-[a-z]+)=='

# Takes an environment that has torch. Later installations must not bring another one.
keep_torch = $(1)/bin/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))' \
               > $(1)/constraints.txt

# A killed install can leave a package that pip takes for whole. `.installing` is there while pip works, with the process id
# of its make: found without that process, the environment cannot be trusted and is made again.
define install
	@echo $$PPID > $(VENV)/.installing
	@$(1) || { rm -f $(VENV)/.installing; exit 1; }
	@rm -f $(VENV)/.installing
endef

# The argument is an environment that has other versions than the lock.
define test_unlocked
	@$(1)/bin/tfserve demo-model
	$(1)/bin/python -m pytest -m 'not slow' -o cache_dir=$(1)/.pytest_cache $(ARGS) || \
	  { $(1)/bin/python -m tests.suspects $(LOCK) $(1)/.pytest_cache; exit 1; }
endef

.DEFAULT_GOAL := help
.PHONY: help serve demo test test-all test-newest test-oldest check format lock gpu-check gpu-wheels clean discard-interrupted

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

test-newest:  ## run the tests of `make test` with the newest release of every package, and say which one breaks them
	@rm -rf $(NEWEST) && $(PYTHON) -m venv $(NEWEST)
	@$(call pip,$(NEWEST)) install $(TORCH_ARGS) '$(TORCH)'
	@$(call keep_torch,$(NEWEST))
	@$(call pip,$(NEWEST)) install --constraint $(NEWEST)/constraints.txt --editable '.[dev]'
	$(call test_unlocked,$(NEWEST))

test-oldest: $(LOCKER)/.stamp  ## the same with the oldest releases that pyproject.toml allows, on its oldest Python
	@command -v $(OLDEST_PYTHON) >/dev/null || \
	  { echo "This needs '$(OLDEST_PYTHON)'; name another Python 3.11: make test-oldest OLDEST_PYTHON=PATH" >&2; exit 1; }
	@rm -rf $(OLDEST) && $(OLDEST_PYTHON) -m venv $(OLDEST)
	@$(call pip,$(OLDEST)) install $(TORCH_ARGS) '$(TORCH)'
	@$(call keep_torch,$(OLDEST))
	@mkdir -p build/locks && echo '$(TORCH)' > build/locks/torch.txt
	@$(compile) --resolution lowest-direct --python $(OLDEST)/bin/python --extra dev pyproject.toml \
	  | $(not_torch) > $(OLDEST)/lowest.txt
	@$(call locked,$(OLDEST),$(OLDEST)/lowest.txt) install --constraint $(OLDEST)/constraints.txt --editable '.[dev]'
	$(call test_unlocked,$(OLDEST))

lock: $(LOCKER)/.stamp  ## renew the exact versions in locks/
	@mkdir -p build/locks && echo '$(TORCH)' > build/locks/torch.txt
	@$(compile) --universal --python-version 3.11 $(LOCKED_EXTRAS:%=--extra %) pyproject.toml \
	  | $(not_torch) > build/locks/main.txt
	@cp build/locks/main.txt build/locks/clients.txt  # which uv starts from: the versions of both differ where they must
	@$(compile) --universal --python-version 3.11 --extra clients --extra ray --extra convert-tokenizer pyproject.toml \
	  --output-file build/locks/clients.txt >/dev/null
	@$(not_torch) build/locks/clients.txt > $(CLIENTS_LOCK)
	@mv build/locks/main.txt $(LOCK)
	@cd tests/clients/node && if command -v npm >/dev/null; then \
	  npm install --package-lock-only --omit-lockfile-registry-resolved --no-audit --no-fund --loglevel=error; fi
	@git diff --stat -- locks tests/clients/node 2>/dev/null || true

check: $(VENV)/.stamp-dev  ## format, lint and types
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/ruff check $(CODE)
	$(BIN)/mypy

format: $(VENV)/.stamp-dev  ## format the code and fix what lint can fix
	$(BIN)/ruff format $(CODE)
	$(BIN)/ruff check --fix $(CODE)

# A GPU machine need not have a network, nor this project's environment: it runs under its own Python, and what that lacks
# comes along as wheels in $(GPU_WHEELS) (ignored by git; `make gpu-wheels` fetches the ones on the package index).
gpu-check:  ## on a machine with a GPU: run tests/gpu, then measure (docs/performance.md); needs no network
	@GPU_PYTHON=$(GPU_PYTHON) GPU_WHEELS=$(GPU_WHEELS) OUT=$(OUT) benchmarks/gpu/check.sh $(ARGS)

gpu-wheels:  ## fetch what `make gpu-check` needs on a bare machine with Python 3.12 (flash-attn: bring its wheel yourself)
	@mkdir -p $(GPU_WHEELS)
	@rm -f $(GPU_WHEELS)/msgspec-*.whl $(GPU_WHEELS)/pytest_asyncio-*.whl
	@$(GPU_PYTHON) -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
	  $(addprefix --platform manylinux,_2_28_x86_64 _2_17_x86_64 2014_x86_64) -d $(GPU_WHEELS) \
	  --constraint $(LOCK) msgspec pytest-asyncio

clean:  ## remove the environments and every cache in this directory (the demo model stays)
	rm -rf $(VENV) $(CLIENTS) $(LOCKER) $(NEWEST) $(OLDEST) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
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
	$(call install,$(call pip,$(VENV)) install --constraint $(LOCK) $(TORCH_ARGS) '$(TORCH)')
	@$(call keep_torch,$(VENV))
	@touch $@

$(VENV)/.stamp-run: $(VENV)/.stamp-torch pyproject.toml $(LOCK)
	$(call install,$(call locked,$(VENV),$(LOCK)) install --constraint $(VENV)/constraints.txt --editable '$(RUN_EXTRAS)')
	@touch $@

$(VENV)/.stamp-dev: $(VENV)/.stamp-run
	$(call install,$(call locked,$(VENV),$(LOCK)) install --constraint $(VENV)/constraints.txt --editable '.[dev]')
	@touch $@

# The browser itself is the system's (Debian: apt install chromium); without one those tests say why they are skipped.
$(VENV)/.stamp-browser: $(VENV)/.stamp-dev
	$(call install,$(call locked,$(VENV),$(LOCK)) install --constraint $(VENV)/constraints.txt --editable '.[browser]')
	@touch $@

$(CLIENTS)/.stamp: $(VENV)/.stamp-dev $(CLIENTS_LOCK)
	@rm -rf $(CLIENTS) && $(BIN)/python -m venv $(CLIENTS)
	@$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  > "$$($(CLIENTS)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/dev.pth"
	$(call locked,$(CLIENTS),$(CLIENTS_LOCK)) install --constraint $(VENV)/constraints.txt --editable '$(CLIENTS_EXTRAS)'
	@touch $@

$(LOCKER)/.stamp: $(LOCK)
	@[ -x $(LOCKER)/bin/python ] || $(PYTHON) -m venv $(LOCKER)
	@$(call pip,$(LOCKER)) install --quiet --constraint $(LOCK) uv
	@touch $@

$(NODE)/.stamp: tests/clients/node/package.json tests/clients/node/package-lock.json
	@mkdir -p $(NODE) && cp $^ $(NODE)
	@if command -v npm >/dev/null; then npm ci --prefix $(NODE) --no-audit --no-fund --loglevel=error; \
	  else echo 'No npm: the JavaScript client will not be tested.' >&2; fi
	@touch $@
