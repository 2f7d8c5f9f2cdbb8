# Every target does its own set-up: `make train` and `make test` work on a fresh machine with python3 >= 3.11
# and a C++ compiler. `make train PYTHON=/path/python` uses that interpreter as it is when it has torch.
PYTHON ?= python3
VENV := .venv
SOURCES := $(shell find csrc -type f) setup.py
# The suite loads the CUDA library too where there is nvcc; `GRPO_KERNELS_CUDA_ARCHITECTURES= make test` leaves it out.
# One architecture: nvcc takes as long for every other, which are compiled nightly.
export GRPO_KERNELS_CUDA_ARCHITECTURES ?= 90
SYSTEMS := $(patsubst tests/nightly/%.txt,$(VENV)/%,$(wildcard tests/nightly/*.txt))

ifeq ($(shell [ "$(origin PYTHON)" != file ] && $(PYTHON) -c "import torch" 2>/dev/null && echo yes),yes)
RUN := PYTHONPATH="$(CURDIR)" $(PYTHON)
READY := grpo_kernels/native/libgrpo_cpu.json
else
RUN := $(VENV)/bin/python
READY := $(VENV)/installed
LOWEST := $(VENV)/lowest
endif

.PHONY: train test test-shuffled test-ranks test-peers mutants nightly coverage soak lint docs bench release clean \
	editable pytorch

train: $(READY)
	$(RUN) -m grpo_kernels train $(ARGS)

# Two workers: most of the suite is one-threaded (the interpreter, autograd). Idle threads must not spin beside them.
PARALLEL := -n 2 --dist worksteal
test test-shuffled test-ranks test-peers nightly soak: export OMP_WAIT_POLICY := passive

# Status 5: ARGS names files of the other call alone.
test: $(READY) $(LOWEST)
	$(RUN) -m pytest $(PARALLEL) -m "not nightly and not peers and not ranks" $(ARGS) || [ $$? -eq 5 ]
	$(MAKE) test-ranks

# Three times, files and the tests of each in other orders: what one test leaves to the next, and what fails now and then.
test-shuffled: $(READY)
	for seed in 1 2 3; do $(RUN) -m pytest $(PARALLEL) -m "not nightly and not peers and not ranks" \
		--random-order --random-order-seed=$$seed $(ARGS) || exit 1; done

# The files with tests so marked, where ARGS names none: collecting all takes longer than some of the tests.
files_of = $(if $(findstring tests/,$(ARGS)),,$(shell grep -l "mark\.$(1)" tests/test_*.py))

# One process: its pools of ranks (tests/distributed.py) are the parallel workers.
test-ranks: $(READY)
	$(RUN) -m pytest -m "ranks and not nightly and not peers" $(call files_of,ranks) $(ARGS) || [ $$? -eq 5 ]

# Against the packages themselves: TRL's trainers, Liger's functions.
test-peers: $(VENV)/peers
	$(VENV)/bin/python -m pytest $(PARALLEL) -m "peers and not nightly" $(call files_of,peers) $(ARGS)

# The suite tested: faults of every source, each of which some test must notice; ARGS="cuda" judges those named so. What
# was interrupted is taken up.
mutants: $(READY)
	$(RUN) -m tests.mutants $(ARGS)

# Every stale part; make nightly PART=list shows them and installs no other package, PART="NAME NAME" runs these, with
# those of the systems that are named.
NAMED := $(if $(PART),$(filter $(PART:%=$(VENV)/%),$(SYSTEMS)),$(SYSTEMS))
nightly: $(if $(filter list,$(PART)),$(VENV)/installed,$(VENV)/peers $(NAMED) $(VENV)/release)
	$(VENV)/bin/python -m tests.nightly $(PART)

# What of the package the suite runs, line by line: build/coverage; 25 minutes. ARGS="tests/FILE.py" for a part of it.
coverage: $(VENV)/coverage $(VENV)/peers
	$(VENV)/bin/python -m tests.nightly.coverage $(ARGS)

# An hour of random calls and accidents; make soak ARGS="--minutes 10". What is interrupted is taken up.
soak: $(READY)
	$(RUN) -m tests.soak $(ARGS)

# Beside TRL, Liger and PyTorch's own; make bench ARGS="--out DIR" writes tables and plots.
bench: $(VENV)/peers
	$(VENV)/bin/python benchmarks/loss.py $(ARGS)

lint: $(VENV)/lint
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu')

# The site, in build/site: every document that README.md leads to, with the reference, searched and checked for dead links.
docs: $(VENV)/docs
	$(VENV)/bin/python docs/site/stage.py build/docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --quiet -f build/docs/mkdocs.yml
	@echo "build/site/index.html; with search: $(VENV)/bin/python -m http.server --directory build/site"

# dist/: what a release is made of; PUBLISHING.md has the rest.
release: $(VENV)/release
	$(VENV)/bin/python release/wheels.py $(ARGS)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# What is imported is compiled then, once, and kept; pip would compile thousands of modules that nothing here imports.
INSTALL := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile
unexport PYTHONDONTWRITEBYTECODE

# PyTorch, half a minute of one core, beside the compilers; then the rest. The extras are those of what is installed by
# then, the package itself: as "-e .[test]" each would build it anew.
$(VENV)/installed: pyproject.toml constraints.txt $(SOURCES) | $(VENV)/bin/python
	@echo "compiling csrc/cpu: 40 seconds; where there is nvcc, csrc/cuda for sm_$(GRPO_KERNELS_CUDA_ARCHITECTURES): a minute more"
	$(MAKE) --no-print-directory -j 2 editable pytorch
	$(INSTALL) -c constraints.txt "grpo-kernels[test,reasoning]"
	touch $@

# The library built into the package: the tree that runs is the tree that was built.
editable:
	$(INSTALL) --no-deps -e .

pytorch:
	$(INSTALL) -c constraints.txt torch

# The lowest of what pyproject.toml allows beside PyTorch, in a folder that tests/test_versions.py alone shows to a test.
$(VENV)/lowest: tests/nightly/versions/lowest.txt | $(VENV)/installed
	grep -Ev '^(#|python==|torch==)' $< | $(INSTALL) --upgrade --target $@ -r /dev/stdin
	touch $@

$(VENV)/peers: $(VENV)/installed
	$(INSTALL) -c constraints.txt "grpo-kernels[peers]"
	touch $@

# Without their dependencies, which are other PyTorches and transformers, each in a folder that its part of nightly alone
# sees. What is built of sources (OpenRLHF's DeepSpeed and flash-attn) is its Python, without GPU kernels.
$(SYSTEMS): export DS_BUILD_OPS := 0
$(SYSTEMS): export FLASH_ATTENTION_SKIP_CUDA_BUILD := TRUE
$(SYSTEMS): export FLASH_ATTENTION_FORCE_BUILD := TRUE
$(SYSTEMS): $(VENV)/%: tests/nightly/%.txt | $(VENV)/installed
	$(INSTALL) --no-deps --no-build-isolation --upgrade --target $@ -r $<
	rm -rf $@/tests $@/scripts
	touch $@

$(VENV)/lint: $(VENV)/installed
	$(INSTALL) -c constraints.txt "grpo-kernels[lint]"
	touch $@

$(VENV)/coverage: $(VENV)/installed
	$(INSTALL) -c constraints.txt "grpo-kernels[coverage]"
	touch $@

$(VENV)/docs: $(VENV)/installed
	$(INSTALL) -c constraints.txt "grpo-kernels[docs]"
	touch $@

$(VENV)/release: $(VENV)/installed
	$(INSTALL) -c constraints.txt "grpo-kernels[release]"
	touch $@

# Without setuptools there is no library; plain PyTorch serves, and `info` says so.
grpo_kernels/native/libgrpo_cpu.json: $(SOURCES)
	$(PYTHON) setup.py --quiet build_ext --inplace || echo "no compiled CPU kernels: see python -m grpo_kernels info"

clean:
	rm -rf $(VENV) build grpo_kernels/native *.egg-info
