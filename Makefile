PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
PIP := $(BIN)/pip install -qq --disable-pip-version-check
PYTORCH_CPU := https://download.pytorch.org/whl/cpu

# `python -m` would put the root on sys.path, and its folder kernels/ is not the PyPI package of that name.
export PYTHONSAFEPATH := 1

# Default builds of torch bring CUDA (gigabytes) and their own Triton.
TORCH = torch==2.13.0$(if $(CPU_LINUX),+cpu triton==3.6.0)
CPU_LINUX = $(shell [ "$$(uname)" = Linux ] && ! nvidia-smi >/dev/null 2>&1 && echo yes)

# What tests compare with, without their dependencies: these ask for data sets' readers, or for a numpy that Triton's
# interpreter cannot use.
PEERS := eval-unlearn==1.1.2 eai-sparsify==1.3.3 simple-parsing==0.1.9 natsort==8.4.0 einops==0.8.2

.PHONY: demo test soak lint bench gpu minicanvas clean

demo: $(READY)
	$(BIN)/saemnesia-fast demo --out demo $(ARGS)

# Tests are small: two processes of one thread each are faster than one of two. A file's tests share what they make.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

# Training and collecting killed at 50 random moments instead of 10.
soak: $(READY)
	SAEMNESIA_FAST_KILLS=50 $(BIN)/pytest tests/test_never_loses_work.py $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python benchmarks ops $(ARGS)

# With the machine's own Python: nothing is fetched.
gpu:
	$(PYTHON) benchmarks gpu $(ARGS)

minicanvas: $(READY)
	$(BIN)/python -m saemnesia_fast.minicanvas $(ARGS)

$(READY): Makefile pyproject.toml requirements-dev.txt setup.py $(wildcard csrc/*.cpp csrc/*/*)
	@echo "Installing into .venv: some minutes the first time"
	@$(PYTHON) -m venv .venv
	@$(PIP) $(TORCH) 2>/dev/null || $(PIP) $(TORCH) --extra-index-url $(PYTORCH_CPU)
	@$(PIP) -r requirements-dev.txt
	@$(PIP) --no-deps $(PEERS) || echo "Without $(PEERS): tests with them will be skipped"
	@$(PIP) --no-build-isolation -e . || { echo "Once more, without the C++ extension"; \
		SAEMNESIA_FAST_BUILD=0 $(PIP) --no-build-isolation -e .; }
	@touch $@

clean:
	rm -rf .venv build dist demo .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info saemnesia_fast/_C*.so
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
