# make demo   see the seven families made faster on photographs (ARGS="--models cait_xxs24_224 --batch 4" and so on)
# make train  train a classifier; ARGS="--data digits --model ceit --out runs/ceit", docs/training.md tells the rest
# make test   the whole test suite                              (ARGS="-k cvt")
# make bench  models beside other runtimes and libraries, hours; ARGS=--quick is a sample in less than 5 minutes;
#             make bench SUITE=ops: operators; SUITE=coverage: what is fused in timm's and transformers' models;
#             make bench-zentorch adds AMD's compiler, which has a torch of its own
# make versions  the same of other versions of timm, transformers, torchvision and vit-pytorch, which it installs
# make overhead  microseconds of a call of each operator beside its bare kernels  (ARGS="-k linear")
# make fuzz   thousands of random calls of every operator, with each instruction set   (SEEDS=0:10000 ARGS="--op leff")
# make lint   ruff, mypy, clang-format, the workflows;  make format  applies what can be applied
# make docs   the documentation as a site, in build/site; a broken link or any warning fails
# make build  the native part alone
# make wheel  an sdist and a wheel for each of PYTHONS, in dist/;  make wheel-test  tries them, with TORCH where it is given
#
# PYTHON=python3.12       the Python to make .venv with
# TORCH="torch==2.11.0"   another torch (pip's options may follow, such as --index-url); when not given, a torch >= 2.10
#                         already there is kept
# PYTHONS="python3.11 python3.12"  the Pythons of the wheels

PYTHON ?= python3
PYTHONS ?= $(PYTHON)
TORCH ?=
ARGS ?=
# Two processes: much of the suite is Python and compilers, which one process leaves a core idle for. Files are taken in
# the order of tests/conftest.py, the longest first.
PYTEST_JOBS ?= -n 2 --dist loadfile --no-loadscope-reorder

SEEDS ?= 0:10000
SUITE ?= models

VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/stamps
ENVIRONMENT := $(PYTHON) requirements/environment.py
PINS := requirements/environment.py $(wildcard requirements/*.txt)
# Everything that goes into the native part, and what an editable install reads.
CXX_FILES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.inc' -o -name '*.cu' -o -name '*.cuh')
NATIVE := setup.py pyproject.toml fastvit/_version.py $(CXX_FILES)

.PHONY: demo train test bench overhead versions fuzz lint format docs build wheel wheel-test clean
.DELETE_ON_ERROR:

demo: $(STAMPS)/demo $(STAMPS)/native
	$(BIN)/python benchmarks/demo.py $(ARGS)

train: $(STAMPS)/train $(STAMPS)/native
	$(BIN)/python examples/train.py $(ARGS)

test: $(STAMPS)/test $(STAMPS)/native-complete
	$(BIN)/python -m pytest $(PYTEST_JOBS) --durations=15 $(ARGS)

bench: $(STAMPS)/bench $(STAMPS)/native
	$(BIN)/python -m benchmarks.$(SUITE) $(ARGS)

# Contenders that need a torch of their own; the runner finds them in .venv/bench.
.PHONY: bench-zentorch bench-torch-tensorrt
bench-zentorch bench-torch-tensorrt: bench-%:
	$(PYTHON) -m venv $(VENV)/bench/$*
	$(VENV)/bench/$*/bin/python -m pip --disable-pip-version-check install -r requirements/bench-$*.txt

overhead: $(STAMPS)/test $(STAMPS)/native
	@mkdir -p benchmarks/out
	$(BIN)/python -m pytest benchmarks/overhead -q --benchmark-enable --benchmark-quiet --benchmark-max-time 0.3 \
		--benchmark-json benchmarks/out/overhead.json $(ARGS)
	$(BIN)/python -m benchmarks.overhead.report benchmarks/out/overhead.json

versions: $(STAMPS)/test $(STAMPS)/native
	$(BIN)/python requirements/versions.py $(VENV)/versions
	$(BIN)/python -m pytest tests/compat/test_versions.py $(ARGS)

fuzz: $(STAMPS)/test $(STAMPS)/native
	$(BIN)/python -m tests.fuzz --seeds $(SEEDS) $(ARGS)

lint: $(STAMPS)/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	$(BIN)/check-jsonschema --quiet --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/zizmor --quiet --offline --pedantic .github/workflows

format: $(STAMPS)/lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

docs: $(STAMPS)/docs
	$(BIN)/mkdocs build --strict $(ARGS)

build: $(STAMPS)/demo $(STAMPS)/native

# Of a release, so without the CUDA part, wherever they are made; FASTVIT_BUILD_CUDA=1 builds it in.
wheel: export FASTVIT_BUILD_CUDA := $(or $(FASTVIT_BUILD_CUDA),0)
wheel: $(STAMPS)/wheel
	$(BIN)/python requirements/wheels.py build $(PYTHONS)

wheel-test:
	$(PYTHON) requirements/wheels.py test $(if $(TORCH),--torch "$(TORCH)") $(PYTHONS)

# What is installed, per purpose.
$(STAMPS)/demo $(STAMPS)/train $(STAMPS)/test $(STAMPS)/bench: $(STAMPS)/%: $(PINS) $(STAMPS)/torch
	$(ENVIRONMENT) $* --venv $(VENV) $(if $(TORCH),--torch "$(TORCH)")
	@touch $@

$(STAMPS)/lint $(STAMPS)/docs $(STAMPS)/wheel: $(STAMPS)/%: $(PINS)
	@mkdir -p $(STAMPS)
	$(ENVIRONMENT) $* --venv $(VENV)
	@touch $@

# Renewed only when a TORCH is named that is not the one installed last.
$(STAMPS)/torch: FORCE
	@mkdir -p $(STAMPS)
	@if [ ! -e $@ ] || { [ -n "$(TORCH)" ] && [ "$$(cat $@)" != "$(TORCH)" ]; }; then printf '%s' "$(TORCH)" > $@; fi

.PHONY: FORCE
FORCE:

# fastvit itself, editable, with the native part where it can be built.
NATIVE_NEEDS := $(firstword $(filter bench,$(MAKECMDGOALS)) $(if $(filter test overhead versions,$(MAKECMDGOALS)),test) \
	$(filter train,$(MAKECMDGOALS)) demo)
$(STAMPS)/native: $(NATIVE) | $(STAMPS)/$(NATIVE_NEEDS)
	@echo "==> building fastvit"
	$(BIN)/python setup.py --quiet build_ext --inplace
	$(BIN)/python -m pip --disable-pip-version-check --quiet install --no-build-isolation --no-deps -e .
	@touch $@

# The same with the CUDA part wherever there is an nvcc: the tests look into the binary. Else torch must have CUDA, too.
$(STAMPS)/native-complete: export FASTVIT_BUILD_CUDA := $(if $(shell command -v nvcc),1)
$(STAMPS)/native-complete: $(NATIVE) | $(STAMPS)/test
	@echo "==> building fastvit, with the CUDA part where there is an nvcc"
	$(BIN)/python setup.py --quiet build_ext --inplace
	$(BIN)/python -m pip --disable-pip-version-check --quiet install --no-build-isolation --no-deps -e .
	@touch $@ $(STAMPS)/native

clean:
	rm -rf build dist *.egg-info $(VENV) .editable fastvit/kernels fastvit/*.so fastvit/_build_info.json
