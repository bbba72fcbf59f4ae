# Every target sets up what it needs: a virtual environment, pinned dependencies, the native build.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := $(shell find src CMakeLists.txt pyproject.toml -type f -not -name '*.pyc')

.PHONY: demo test lint bench proofs gpu clean

demo: $(VENV)/.installed
	$(BIN)/onecard demo --force

test: $(VENV)/.installed
	$(BIN)/python -m pytest -q

lint: $(VENV)/.installed
	$(BIN)/ruff check src tests benchmarks scripts
	$(BIN)/ruff format --check src tests benchmarks scripts
	$(BIN)/mypy

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/compress.py

proofs: $(VENV)/.installed
	$(BIN)/python -m pytest -q -m slow
	$(BIN)/python benchmarks/compress.py --check
	PYTHON=$(abspath $(BIN)/python) sh benchmarks/peers/proof.sh

gpu: $(VENV)/.installed
	$(BIN)/python benchmarks/gpu.py

$(VENV)/.dependencies: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt \
		$$($(PYTHON) -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
		d = p['dependencies'] + [x for g in p['optional-dependencies'].values() for x in g]; \
		print(*(x.split('>')[0] for x in d if not x.startswith('onecard')))")
	touch $@

$(VENV)/.installed: $(VENV)/.dependencies $(SOURCES)
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --force-reinstall .
	touch $@

clean:
	rm -rf $(VENV) build onecard-demo
