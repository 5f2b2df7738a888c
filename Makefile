# make demo    train, judge and report: runs/compare/report.html
# make test    the tests
# make check   everything CI checks: format, lint, types, tests
# make docs    the documentation, every output computed: site/index.html
# make docs-check  build it, then look at every page and report in a headless Chromium
# make docs-smoke  build it with ProperDocs and Zensical too, in environments of their own
# make bench   speed, memory and growth beside named peers: results/benchmarks/result.json
# make mutation  how many small mistakes in analysis, nn and causal the tests notice
# make stress  kills, flipped bits, wrong input, failing hooks, hostile strings: every promise attacked
# Each installs into .venv first if that is missing or older than the project's own files.

PYTHON ?= python3
BIN := .venv/bin
TORCH_THREADS := OMP_NUM_THREADS=1

.PHONY: demo test check format lint types docs docs-check docs-smoke bench mutation stress clean

demo: .venv/installed
	$(BIN)/smearlens compare --out runs/compare

test: .venv/installed
	$(TORCH_THREADS) $(BIN)/python -m pytest -q -n 2

check: .venv/installed lint types test

format: .venv/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: .venv/installed
	$(BIN)/pyrefly check

docs: .venv/installed-docs
	$(TORCH_THREADS) $(BIN)/python docs/build_tutorials.py
	$(BIN)/mkdocs build --strict

docs-check: docs
	$(TORCH_THREADS) $(BIN)/python docs/check_site.py

docs-smoke: docs
	$(BIN)/python docs/smoke_builds.py

bench: .venv/installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,bench]'
	$(BIN)/python benchmarks/run.py

mutation: .venv/installed
	$(TORCH_THREADS) $(BIN)/python benchmarks/mutation.py --sample 300 --seed 8

stress: .venv/installed
	$(TORCH_THREADS) $(BIN)/python benchmarks/stress.py

.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

.venv/installed-docs: .venv/installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,docs]'
	touch $@

clean:
	rm -rf .venv build dist
