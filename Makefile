# Every target sets up what it needs: a virtual environment, pinned dependencies, the native build.
PYTHON ?= python3
VENV ?= .venv
JOBS ?= $(shell getconf _NPROCESSORS_ONLN)
BIN := $(VENV)/bin
SOURCES := $(shell find src CMakeLists.txt pyproject.toml -type f -not -name '*.pyc')

.PHONY: demo test lint bench proofs proofs-here proofs-peers gpu sanitize neon clean

demo: $(VENV)/.installed
	$(BIN)/onecard demo --methods --force
	$(BIN)/onecard demo --force

test: $(VENV)/.installed
	$(BIN)/python -m pytest -q

lint: $(VENV)/.installed
	$(BIN)/ruff check src tests benchmarks scripts
	$(BIN)/ruff format --check src tests benchmarks scripts
	$(BIN)/mypy

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/compress.py

# What takes longer than a test may: our own proofs, then every method beside its peers (hours).
proofs: proofs-here proofs-peers

proofs-here: $(VENV)/.installed
	$(BIN)/python -m pytest -q -m slow
	$(BIN)/python benchmarks/compress.py --check
	$(BIN)/python benchmarks/pruning.py --check
	$(BIN)/python benchmarks/training.py --check
	$(BIN)/python benchmarks/orderings.py --check
	$(BIN)/python benchmarks/cost.py --check
	$(BIN)/python benchmarks/fit.py --check

proofs-peers: $(VENV)/.installed
	PYTHON=$(abspath $(BIN)/python) sh benchmarks/peers/proof.sh

gpu: $(VENV)/.installed
	$(BIN)/python benchmarks/gpu.py

# The native tests with the library under address and undefined-behaviour sanitizers, and the driver of
# tests/native under both these and the thread sanitizer (which an interpreter is in the way of).
NATIVE_TESTS := $(wildcard tests/test_*native.py) tests/test_engine.py tests/test_engine_families.py
PRELOAD = $(shell $(CXX) -print-file-name=libasan.so) $(shell $(CXX) -print-file-name=libubsan.so)
sanitize: $(VENV)/.installed
	cmake -S . -B build/address -DONECARD_SANITIZE=address -DONECARD_DRIVER=ON
	cmake --build build/address -j $(JOBS)
	cmake -S . -B build/thread -DONECARD_SANITIZE=thread -DONECARD_DRIVER=ON
	cmake --build build/thread --target driver -j $(JOBS)
	build/address/driver
	setarch -R build/thread/driver
	LD_PRELOAD="$(PRELOAD)" ASAN_OPTIONS=detect_leaks=0 ONECARD_NATIVE=build/address/_native.so \
		$(BIN)/python -m pytest -q -p no:cacheprovider $(NATIVE_TESTS)

# The library for 64-bit ARM, checked in an emulator: needs aarch64-linux-gnu-g++ and qemu-aarch64.
neon:
	cmake -S . -B build/neon -DONECARD_DRIVER=ON -DCMAKE_SYSTEM_NAME=Linux \
		-DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++
	cmake --build build/neon --target driver -j $(JOBS)
	qemu-aarch64 -L /usr/aarch64-linux-gnu build/neon/driver

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
	rm -rf $(VENV) build onecard-demo onecard-methods
