# Thin names for commands that the README also shows.
PYTHON ?= python3
# a CPU build: from a local wheel where one is configured, else from PyTorch's own index
TORCH_CPU ?= torch==2.13.0+cpu
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
TORCH_GPU ?= torch
# beside a CPU build, for its interpreter and compiler; a CUDA build of torch brings its own
TRITON_CPU ?= triton==3.7.1
# the last transformers 4 and what it needs in another version than transformers 5 does, in a folder beside the environment
TRANSFORMERS_4 ?= transformers==4.57.6 huggingface_hub==0.36.2 tokenizers==0.22.2 requests urllib3 certifi idna charset_normalizer
VENV ?= .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install --quiet --disable-pip-version-check
# with torch's version fixed, nothing that is installed later can replace it
CONSTRAIN = $(RUN) -c "import torch; print('torch==' + torch.__version__)" > $(VENV)/constraints.txt

.PHONY: setup demo test gpu-test lint bench gpu-bench

setup: $(VENV)/.installed

$(VENV)/.torch:
	$(PYTHON) -c "import sys; sys.exit('Python 3.11 or newer is needed, this is ' + sys.version.split()[0] if sys.version_info < (3, 11) else 0)"
	$(PYTHON) -m venv $(VENV)
	$(PIP) "setuptools>=77" "pybind11>=2.12" wheel numpy
	if command -v nvidia-smi > /dev/null && nvidia-smi -L > /dev/null 2>&1; then $(PIP) "$(TORCH_GPU)"; \
	else $(PIP) --retries 1 --timeout 15 "$(TORCH_CPU)" 2> /dev/null \
	  || $(PIP) --retries 2 --timeout 60 --index-url "$(TORCH_CPU_INDEX)" "$(TORCH_CPU)"; fi
	touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml setup.py $(shell find csrc -type f)
	$(CONSTRAIN)
	$(PIP) -c $(VENV)/constraints.txt --no-build-isolation --editable ".[demo]"
	$(RUN) -m jepa_fast.cli info | grep -i "C++ kernels:" || true
	touch $@

$(VENV)/.tested: $(VENV)/.installed
	$(RUN) -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['test'], sep='\n')" > $(VENV)/test.txt
	$(RUN) -c "import triton" 2> /dev/null || $(PIP) "$(TRITON_CPU)"
	$(PIP) -c $(VENV)/constraints.txt --requirement $(VENV)/test.txt
	$(PIP) --no-deps --upgrade --target $(VENV)/transformers4 $(TRANSFORMERS_4)
	touch $@

demo: $(VENV)/.installed
	$(VENV)/bin/jepa-fast train lejepa_mnist --eval

test: $(VENV)/.tested
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n 2 --dist worksteal

# on a machine with a GPU, with whatever torch and triton are there: nothing is installed
gpu-test:
	$(PYTHON) setup.py -q build_ext --inplace
	PYTHONPATH=. $(PYTHON) -m pytest -q -m gpu

gpu-bench:
	$(PYTHON) -m bench.on_gpu --out bench/results/gpu/here

lint: $(VENV)/.tested
	$(RUN) -m ruff check .

bench: $(VENV)/.tested
	$(VENV)/bin/jepa-fast bench ops
	$(VENV)/bin/jepa-fast bench step --batch-size 16
