# Every target sets up what it needs in $(VENV); nothing is installed outside the checkout.
PYTHON ?= python3
VENV   ?= .venv
LOCK   := requirements.lock
# The torch that ktx is built with: words for pip. Which build of it, .ci/install_torch.py says.
TORCH  ?= torch==2.13.0
TESTS  ?= tests
SIDE_BY_SIDE ?= -n auto --maxprocesses 4 --dist worksteal
SECONDS ?= 1800
FOLDERS ?= quant weights kernels cache ops families injection placement loader model engine chat_formats server hub cli
SEED    ?= 1
PY     := $(VENV)/bin/python
NEWEST := .venv-newest/bin/python
ALLOWED := .venv-allowed/bin/python
PIP    := $(PY) -m pip --disable-pip-version-check install --quiet
SOURCES := setup.py $(wildcard csrc/*.cpp csrc/*.h csrc/cpu/*/*)

.DEFAULT_GOAL := help
.PHONY: help chat test test-fast test-oldest test-newest test-allowed cpu-check gpu-check bench mutants soak sanitize lint docs lock wheel clean

help:                 ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

chat: $(VENV)/.ktx    ## talk to the bundled demo model (or: make chat ARGS="--model DIR --weights FILE", ARGS='-p "What is a rule file?"')
	@$(PY) -m ktx.local_chat $(ARGS)

test: $(VENV)/.dev    ## the whole test suite (KTX_ISA=scalar|avx2|avxvnni|avx512vnni|... chooses the kernels)
	$(PY) -m pytest $(SIDE_BY_SIDE) $(TESTS)

# Files of every folder that take few seconds, without the tests that are marked slow.
FAST ?= tests/cache/test_pages.py tests/chat/test_chat.py::test_usage_errors_are_one_line tests/chat_formats/test_messages.py tests/chat_formats/test_parser.py tests/cli/test_arguments.py \
	tests/demo/test_demo.py tests/engine/test_scripted.py tests/engine/test_stats.py tests/families/test_declarations.py tests/gpu/test_placed.py \
	tests/hub/test_file_selection.py tests/injection/test_rules.py tests/integrations/test_experts_interface.py::test_some_tokens_and_none tests/kernels/test_expert_stats.py \
	tests/kernels/test_tiles.py tests/loader/test_defaults.py tests/model/test_notes.py tests/ops/test_forward_signature.py tests/placement \
	tests/replicas/test_affinity.py tests/repo/test_public.py tests/server/test_auth.py tests/top tests/utils/test_old_names.py tests/weights/test_accounting.py
test-fast: $(VENV)/.dev  ## the tests of every folder that are quick, in less than a minute
	$(PY) -m pytest $(SIDE_BY_SIDE) -m "not slow" $(FAST)

# What meets transformers: its models and configurations, caches, tokenizers and templates.
OLDEST ?= tests/ops tests/families tests/loader tests/model/test_lora.py tests/model/test_gguf_lora.py tests/model/test_peft.py tests/model/test_peft_experts.py \
	tests/model/test_peft_methods.py tests/model/test_accelerate.py tests/model/test_matrix.py tests/model/test_programs.py tests/model/test_training.py \
	tests/integrations/test_experts_interface.py tests/cache tests/weights tests/engine tests/chat_formats/test_templates.py tests/server/test_openai.py tests/demo
test-oldest: $(VENV)/.oldest  ## what meets transformers, on the oldest one that we support
	PYTHONPATH=$(VENV)/transformers-5.17:. $(PY) -m pytest $(SIDE_BY_SIDE) $(OLDEST)

# What meets other people's code: theirs above, the hub, clients of the server, the terminal, their private names.
OTHERS ?= tests/hub tests/server/test_clients.py tests/repo/test_packaging.py::test_a_private_name_of_others_is_there
TORCH_NEWEST ?= torch
test-newest: $(VENV)/.ktx  ## what meets other people's code, on the newest of everything, whatever pyproject.toml admits
	$(PYTHON) -m venv .venv-newest
	$(NEWEST) -m pip --disable-pip-version-check install --quiet --upgrade pip setuptools wheel
	$(NEWEST) .ci/install_torch.py --upgrade $(TORCH_NEWEST)
	$(NEWEST) .ci/newest.py requirements --lift > .venv-newest/requirements.txt
	$(NEWEST) -m pip install --quiet --upgrade --upgrade-strategy eager -r .venv-newest/requirements.txt
	PYTHONPATH=$(CURDIR) $(NEWEST) .ci/newest.py test $(SIDE_BY_SIDE) $(OLDEST) $(OTHERS) tests/chat/test_chat.py

SMOKE ?= tests/demo $(OTHERS)
test-allowed: $(VENV)/.dev  ## a few tests on the newest versions that pyproject.toml admits, over the torch of $(VENV)
	$(PY) .ci/newest.py over .venv-allowed
	$(PY) .ci/newest.py requirements > .venv-allowed/requirements.txt
	$(ALLOWED) -m pip install --quiet --upgrade --upgrade-strategy eager -r .venv-allowed/requirements.txt
	echo "What is a rule file?" | PYTHONPATH=$(CURDIR) $(ALLOWED) -m ktx.local_chat | grep -F "A rule file is YAML"
	PYTHONPATH=$(CURDIR) $(ALLOWED) .ci/newest.py test $(SIDE_BY_SIDE) $(SMOKE)

cpu-check: $(VENV)/.dev   ## every weight type on every instruction set of this CPU: error, speed, share of the peak
	$(PY) -m ktx.kernels.check

gpu-check: $(VENV)/.dev   ## what a machine with a CUDA GPU has to show (under ten minutes)
	$(PY) benchmarks/gpu_check.py

bench: $(VENV)/.dev   ## kernel speeds against this machine's own limits
	$(PY) benchmarks/kernels.py

mutants: $(VENV)/.dev  ## how many one-place changes the tests of a folder notice (FOLDERS="engine cache" SEED=1)
	$(PY) -m tools.mutants $(FOLDERS) --seed $(SEED)

soak: $(VENV)/.dev    ## half an hour of mixed load on a server of the demo model (SECONDS=300 for less)
	$(PY) benchmarks/soak.py --seconds $(SECONDS)

# Kernels whose lanes are loops are compiled with -O0. -fno-sanitize=null,object-size: AddressSanitizer finds both by itself, and the compiler takes minutes for them.
sanitize:             ## the kernels' C++ drivers under AddressSanitizer and ThreadSanitizer (KTX_ISA chooses the kernels)
	@mkdir -p build/sanitize
	@for kind in address,undefined thread; do \
	  echo "-fsanitize=$$kind"; rm -f build/sanitize/$$kind/*; \
	  ls -S csrc/cpu/*/*.cpp tests/cpp/driver.cpp | xargs -P $$(nproc) -I{} sh -c 'mkdir -p build/sanitize/'$$kind' && \
	    case {} in *scalar.cpp|*emulated.cpp) level=-O0;; *) level=-O1;; esac && $${CXX:-g++} -std=c++20 $$level -g1 -w \
	    -fno-omit-frame-pointer -fno-math-errno -fsanitize='$$kind' -fno-sanitize=null,object-size -Icsrc -c {} -o build/sanitize/'$$kind'/$$(basename {}).o' && \
	  $${CXX:-g++} -fsanitize=$$kind build/sanitize/$$kind/*.o -o build/sanitize/$$kind/driver -lpthread && \
	  build/sanitize/$$kind/driver && KTX_NUMA=fake:2 build/sanitize/$$kind/driver || exit 1; \
	done

lint: $(VENV)/.dev    ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

docs: $(VENV)/.dev    ## run every command and code block of README and docs/
	$(PY) -m pytest $(SIDE_BY_SIDE) tests/repo/test_docs.py

lock:                 ## renew requirements.lock: the newest versions that pyproject.toml admits, for every Python
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip --disable-pip-version-check install --quiet --upgrade uv
	.venv-lock/bin/python .ci/lock.py $(TORCH)

wheel: $(VENV)/.dev   ## one cp311-abi3 wheel in dist/
	$(PY) -m pip wheel --quiet --no-build-isolation --no-deps -w dist .

clean:                ## remove everything that was built here
	rm -rf $(VENV) .venv-* build dist *.egg-info ktx/_C*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit("ktx needs Python 3.11 or newer, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else 0'
	@command -v $${CXX:-g++} >/dev/null || { echo "ktx needs a C++ compiler: apt-get install g++"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) -c $(LOCK) pip setuptools wheel  # an older pip takes minutes to resolve what the tests need

# What everything else is installed by: the lock, as far as this torch agrees.
$(VENV)/constraints.txt: $(LOCK) | $(VENV)/bin/python
	@$(PY) .ci/install_torch.py --constraints $@ $(TORCH)

$(VENV)/.ktx: pyproject.toml $(SOURCES) $(VENV)/constraints.txt
	@echo "compiling the kernels, two to three minutes ..."
	$(PIP) -c $(VENV)/constraints.txt --no-build-isolation -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.ktx
	$(PIP) -c $(VENV)/constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

$(VENV)/.oldest: $(VENV)/.dev
	$(PIP) --target $(VENV)/transformers-5.17 --no-deps transformers==5.17.0 'huggingface_hub<2' httpx httpcore h11 anyio certifi idna
	@touch $@
