# Everything a checkout needs. `make demo` and `make test` set the checkout up themselves.
#
#   PYTHON=...   interpreter to make .venv with (3.10 or later; found by itself otherwise)
#   QUICK=1      bench targets: every row on a smaller sample, about a minute, marked as such
#   ONLY=stage   bench-cpu, -desktop, -gpu: one of its stages, whose rows replace those of its last run

FITS := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.10 python3.14; do \
	"$$p" -c '$(FITS)' 2>/dev/null && echo "$$p" && break; done)

BIN := .venv/bin
READY := .venv/.ready
QUICK ?=

export PAGEDD_QUICK := $(QUICK)

.PHONY: help demo test test-gateway test-gpu check picture bench-cpu bench-desktop bench-gateway bench-gpu bench-service bench-paper docs dist deb dist-test clean
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s  %s\n", $$1, $$2 }' Makefile

demo: $(READY) ## four apps talk to one daemon at the same time (sets everything up first)
	@$(BIN)/python packaging/dev/demo.py

test: $(READY) ## the whole test suite (sets everything up first)
	@$(BIN)/python -m pytest

test-gateway: $(READY) .venv-gateway/.ready ## the official clients of other interfaces, each against a running gateway
	@.venv-gateway/bin/python -m pytest -c tests/gateway/pytest.ini --rootdir tests/gateway tests/gateway

test-gpu: $(READY) ## the tests that need a CUDA device; fails where there is none
	@$(BIN)/python -m pytest tests/gpu -m gpu

check: $(READY) ## ruff, mypy --strict, import boundaries, rules of safety, file lengths
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python packaging/dev/check_imports.py
	$(BIN)/python packaging/dev/check_safety.py
	$(BIN)/python packaging/dev/check_length.py

picture: $(READY) ## take the documentation's picture of the gateway's page (needs chromium)
	@PAGEDD_WRITE_PICTURE=1 $(BIN)/python -m pytest tests/test_gateway_browser.py -k picture

bench-cpu: $(READY) ## measure every figure of docs/benchmarks.md on this machine, half an hour or so
	@$(BIN)/python -m benchmarks.cpu $(ONLY)

bench-gpu: $(READY) ## measure the CUDA engine on this machine; ONLY=stage for one of its stages
	@$(BIN)/python -m benchmarks.gpu $(if $(ONLY),--only $(ONLY))

bench-desktop: $(READY) ## five apps on one machine, beside llama.cpp's own server (built once); 25 minutes or so; GATEWAY=1: over HTTP
	@$(BIN)/python -m benchmarks.desktop $(if $(GATEWAY),--gateway) $(ONLY)

bench-gateway: $(READY) ## measure what the HTTP gateway adds, about 4 minutes
	@$(BIN)/python -m benchmarks.gateway

bench-service: $(READY) ## measure what living with the service costs, about 4 minutes
	@$(BIN)/python -m benchmarks.living

chaos: $(READY) ## kill engines under load, attack the daemon, 45 minutes or so; KILLS=60 for fewer, ONLY=fuzz for a part
	@$(BIN)/python -m benchmarks.chaos $(ONLY) $(if $(KILLS),--kills $(KILLS)) $(if $(SEED),--seed $(SEED))

soak: $(READY) ## an hour of the desktop mix with faults: nothing may grow; SECONDS=180 for a shorter one
	@$(BIN)/python -m benchmarks.soak $(if $(SECONDS),--seconds $(SECONDS))

bench-paper: $(READY) ## repeat the PagedAttention paper's experiments in simulated time, 30 minutes or so
	@$(BIN)/python -m benchmarks.paper

docs: $(READY) ## build the documentation as a site into build/site, links checked
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

dist: $(READY) ## build wheel and sdist into dist/
	@$(BIN)/python -m hatchling build -d dist

deb: dist ## build the Debian package into dist/, and have lintian check it
	@$(BIN)/python packaging/deb/build.py

dist-test: dist ## install wheel and sdist into clean environments and run them, some minutes
	@$(BIN)/python packaging/dev/dist_test.py

clean: ## remove .venv and everything else that was built or cached here
	rm -rf .venv .venv-gateway build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Other people's packages have an environment of their own, so that their pins never touch ours.
.venv-gateway/.ready: tests/gateway/requirements.txt | $(READY)
	@echo "installing the clients of other interfaces into .venv-gateway, half a minute or so"
	@$(BIN)/python -m venv --clear .venv-gateway
	@.venv-gateway/bin/python -m pip install --quiet --disable-pip-version-check --no-input \
		-r tests/gateway/requirements.txt
	@touch $@

# A stamp: made once, and again only when what is to be installed changes.
$(READY): pyproject.toml packaging/dev/bootstrap.py
	@"$(PYTHON)" -c '$(FITS)' 2>/dev/null || { echo >&2 "pagedd needs Python 3.10 or later with the" \
		"venv module (Debian and Ubuntu: apt install python3-venv); found: '$(PYTHON)'." \
		"Name one with make PYTHON=/path/to/python3"; exit 1; }
	@"$(PYTHON)" packaging/dev/bootstrap.py
	@touch $@
