# Every target sets up its own environment: a fresh machine needs Python 3.11 or newer, its venv module, and g++.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
LOCK := requirements.lock
OLDEST := .venv-oldest
DOCS := .venv-docs
RESOLVE := .venv-lock/bin/uv pip compile --quiet --upgrade --universal --python-version 3.11 --extra dev \
	--annotation-style line --custom-compile-command "make lock" pyproject.toml
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
# A file's tests stay in one process and share what they compiled; a process is one thread.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --numprocesses auto --maxprocesses 4 --dist loadfile

.PHONY: demo test test-all test-versions fuzz check format docs lock bench bench-gpu clean sz

# Exact versions, so that no release of anybody else's changes what happens here. The stamp comes last: a half-finished
# install does not count, and one that is older than the lock, or whose Python is gone, is made anew.
$(shell test -x $(BIN)/python || rm -f $(STAMP))
$(STAMP): $(LOCK) pyproject.toml
	@rm -f $@
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo "installing $(LOCK) into $(VENV) (a few minutes the first time)"
	@$(PIP) install --no-deps --requirement $(LOCK)
	@$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@

demo: $(STAMP)  ## train, compress and compile a small ViT on handwriting
	@$(BIN)/python -W ignore examples/digits_vit.py

test: $(STAMP)  ## all tests but the slow and GPU ones
	@$(PYTEST) -m "not slow and not gpu"

test-all: $(STAMP)  ## all tests this machine can run
	@$(PYTEST)

test-versions:  ## the tests of `make test` with the oldest versions supported, then with the newest
	@$(MAKE) test VENV=$(OLDEST) LOCK=requirements-oldest.lock
	@$(MAKE) test

N ?= 1000
fuzz: $(STAMP)  ## N random modules through everything; each failure becomes a test in tests/fuzz/found
	@$(BIN)/python -W ignore tests/fuzz/campaign.py $(N)

check: $(STAMP)  ## style, types and layers
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: $(STAMP)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

# The generator reads the library as text, so its environment needs neither torch nor fxq.
$(DOCS)/.installed: pyproject.toml
	@$(PYTHON) -m venv --clear $(DOCS)
	@$(PYTHON) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])' \
		| xargs $(DOCS)/bin/python -m pip --quiet --disable-pip-version-check install
	@touch $@

docs: $(DOCS)/.installed  ## the pages of docs/ as a site in out/docs; a warning is an error
	@$(DOCS)/bin/zensical build --clean --strict

lock:  ## choose exact versions anew: the newest and the oldest that pyproject.toml allows
	@$(PYTHON) -m venv --clear .venv-lock
	@.venv-lock/bin/python -m pip install --quiet --disable-pip-version-check uv
	@$(RESOLVE) --resolution highest --output-file requirements.lock
	@$(RESOLVE) --resolution lowest-direct --output-file requirements-oldest.lock
	@rm -rf .venv-lock

bench: $(STAMP)  ## CPU benchmarks; results go to benchmarks/results
	@$(BIN)/python benchmarks/cpu_models.py --isa avx2
	@$(BIN)/python benchmarks/cpu_models.py --isa native
	@$(BIN)/python benchmarks/cpu_int8_linear.py --isa avx2
	@$(BIN)/python benchmarks/cpu_int8_conv.py --isa avx2 --threads 1
	@$(BIN)/python benchmarks/cpu_int4_linear.py --isa avx2 --threads 1
	@$(BIN)/python benchmarks/cpu_int4_linear.py --isa avx2 --threads 2
	@$(BIN)/python benchmarks/cpu_weight_only_linear.py --threads 1
	@$(BIN)/python benchmarks/cpu_weight_only_linear.py --threads 2
	@$(BIN)/python benchmarks/planted_imbalance.py
	@$(BIN)/python benchmarks/data_free.py calibration
	@$(BIN)/python benchmarks/data_free.py entropy --threads 1
	@$(BIN)/python benchmarks/cpu_rectified_attention.py --threads 1
	@$(BIN)/python benchmarks/import_time.py

MINUTES ?= 8
bench-gpu:  ## the GPU benchmark, with the Python that is there and no install; goes on where it stopped
	@PYTHONPATH=. $(PYTHON) benchmarks/gpu.py --out benchmarks/results/gpu --minutes $(MINUTES)

sz: ## core lines, median and maximum file length
	@git ls-files 'fxq/*.py' 'passes/*.py' 'lowering/*.py' | xargs wc -l | sort -n | awk '$$2 != "total" {n[NR]=$$1; f=$$2} $$2 == "total" {t=$$1} END {print t " lines in " NR-1 " files, median " n[int(NR/2)] ", largest " n[NR-1] " (" f ")"}'

clean:
	rm -rf $(VENV) $(OLDEST) $(DOCS) .venv-lock .cache
