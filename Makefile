# `make demo` and `make test` do their own set-up. PYTHON=python3.12 picks another interpreter.
PYTHON ?=
export PYTHON

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all docs wheel bench-peers bench-gpu lint clean distclean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 12

setup:  ## create or update .venv (fast when nothing changed)
	@bash scripts/setup.sh

demo: setup  ## train Residual and HeavyBall side by side on real digit images, compare scores and robustness
	.venv/bin/python benchmarks/demo.py

# All four checks run and any of them fails the target; pytest comes last so that the output ends with its summary.
test: setup  ## ruff check, ruff format --check, mypy, pytest
	@status=0; \
	.venv/bin/python -m ruff check . || status=1; \
	.venv/bin/python -m ruff format --check . || status=1; \
	.venv/bin/python -m mypy || status=1; \
	.venv/bin/python -m pytest || status=1; \
	exit $$status

test-all: setup  ## test, and every momentum rule on every network
	.venv/bin/python -m pytest -m ""

# pip warns that the newer requests is not for torchattacks, which never sees it; so its words are shown when it fails.
.docs-tools/done: docs/requirements.txt
	@rm -rf .docs-tools && mkdir .docs-tools
	@.venv/bin/python -m pip install --quiet --target .docs-tools -r $< >.docs-tools/log 2>&1 || { cat .docs-tools/log; exit 1; }
	@touch $@

docs: setup .docs-tools/done  ## these pages and the interface in Python as a site, build/site; warnings are errors
	PYTHONPATH=.docs-tools .venv/bin/python -m sphinx -q -W --keep-going -b html -d build/doctrees -c docs . build/site
	@echo "docs: built build/site/index.html"

wheel:  ## wheel and sdist into dist, and the wheel in an empty environment, with what pip finds for it
	bash scripts/wheel.sh

bench-peers: setup  ## other people's sparse layers, in .peers, for benchmarks/moe_layer.py
	.venv/bin/python -m pip install --quiet --no-deps --upgrade --target .peers -r benchmarks/peers.txt

bench-gpu: setup  ## every GPU figure, into benchmarks/results/gpu
	bash scripts/bench_gpu.sh

lint: setup  ## fix what ruff can fix, and format
	.venv/bin/python -m ruff check --fix .
	.venv/bin/python -m ruff format .

clean:  ## remove caches and build leftovers (keeps .venv, data/ and runs/)
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +

distclean: clean  ## also remove .venv
	rm -rf .venv
