# Every target sets up its own environment: a fresh machine needs Python 3.11 or newer, its venv module, and g++.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-all check format bench bench-gpu clean sz

$(STAMP): pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing fxq and what its demo and tests need into $(VENV) (a few minutes the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

demo: $(STAMP)  ## train, compress and compile a small ViT on handwriting
	@$(BIN)/python -W ignore examples/digits_vit.py

test: $(STAMP)  ## all tests but the slow and GPU ones
	@$(BIN)/python -m pytest -m "not slow and not gpu" -q

test-all: $(STAMP)  ## all tests this machine can run
	@$(BIN)/python -m pytest -q

check: $(STAMP)  ## style, types and layers
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: $(STAMP)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(STAMP)  ## CPU benchmarks; results go to benchmarks/results
	@$(BIN)/python benchmarks/cpu_vit.py --isa avx2
	@$(BIN)/python benchmarks/cpu_vit.py --isa native
	@$(BIN)/python benchmarks/cpu_int8_linear.py --isa avx2
	@$(BIN)/python benchmarks/planted_imbalance.py
	@$(BIN)/python benchmarks/data_free.py calibration
	@$(BIN)/python benchmarks/data_free.py entropy --threads 1
	@$(BIN)/python benchmarks/cpu_rectified_attention.py --threads 1
	@$(BIN)/python benchmarks/import_time.py

bench-gpu: $(STAMP)  ## GPU benchmarks, not measured yet; results go to benchmarks/results
	@$(BIN)/python benchmarks/gpu_rectified_attention.py
	@$(BIN)/python benchmarks/gpu_int8_linear.py

sz: ## core lines, median and maximum file length
	@git ls-files 'fxq/*.py' 'passes/*.py' 'lowering/*.py' | xargs wc -l | sort -n | awk '$$2 != "total" {n[NR]=$$1; f=$$2} $$2 == "total" {t=$$1} END {print t " lines in " NR-1 " files, median " n[int(NR/2)] ", largest " n[NR-1] " (" f ")"}'

clean:
	rm -rf $(VENV)
