# Everything runs on the CPU unless JAX_PLATFORMS says otherwise, e.g.
#   JAX_PLATFORMS=cuda make quickstart        (after: make env PYTHON=python3.12, which the kernels
#   want, and .venv/bin/pip install -e '.[cuda]')
# PYTHON and PYTHON_KERNELS name the interpreters if the ones found are not the ones you want.
JAX_PLATFORMS ?= cpu
export JAX_PLATFORMS
# Without bytecode every process would compile the whole of JAX anew, which takes seconds.
export PYTHONDONTWRITEBYTECODE :=

# 3.11 comes first: it is the oldest version supported, and the one that the oracles' torch is for.
PYTHON ?= $(shell scripts/find_python 3.11 3.12 3.13)
PYTHON_KERNELS ?= $(shell scripts/find_python 3.12 3.13)
VENV := .venv
VENV_KERNELS := .venv312
# All processors; one test at a time: PYTEST_ARGS='-n 0 tests/...'.
PYTEST_ARGS ?=
PARALLEL := -n auto --dist worksteal
# Bytecode is made when a module is first imported; most of what is installed never is.
INSTALL := -m pip install --quiet --disable-pip-version-check --no-compile

.PHONY: help env env-kernels test test-gpu test-kernels test-versions coverage lint format quickstart ablate-quick reproduce-quick fuzz kills clean
help:
	@echo 'make env           environment in $(VENV) with the project and all it needs'
	@echo 'make quickstart    convert the small model, ask it about a long document'
	@echo 'make ablate-quick  a small ablation of the small model, on a CPU in minutes'
	@echo 'make reproduce-quick  the authors'"'"' runs on the small model, with a text of the repository'
	@echo 'make test          the tests, in parallel (PYTEST_ARGS="-k name" passes options on)'
	@echo 'make test-kernels  the tests of kernels, model and method on Python 3.12 and jax 0.11'
	@echo 'make test-gpu      the tests marked gpu, on Python 3.12 with jax[cuda]'
	@echo 'make fuzz          damaged files, many examples; make kills  100 kills of each kind'
	@echo 'make test-versions  a slice of the tests on 3.11 to 3.13, lowest and highest dependencies;'
	@echo '                   ALL=--all: every test'
	@echo 'make coverage      lines of the three packages that their own tests run, 90% of each at least'
	@echo 'make lint          ruff, format, types and import contracts;  make format repairs'

env: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo 'error: no Python 3.11 or newer found; set PYTHON=' >&2; exit 2; }
	"$(PYTHON)" -m venv --clear $(VENV)
	$(VENV)/bin/python $(INSTALL) -e '.[test,dev,small]'
	@touch $@

$(VENV_KERNELS)/.installed: pyproject.toml
	"$(PYTHON_KERNELS)" -m venv --clear $(VENV_KERNELS)
	$(VENV_KERNELS)/bin/python $(INSTALL) -e '.[test]'
	@touch $@

test: env
	$(VENV)/bin/python -m pytest $(PARALLEL) $(PYTEST_ARGS)

# What depends on the version of jax: kernels and model, and of the method what goes through all of it;
# `make test-versions` has sampling and selection. The rest goes over them again, or over files,
# settings, training and evaluation.
KERNELS := tests/kernels tests/network/test_transformer.py tests/network/test_rope.py \
	$(addprefix tests/method/test_, \
	denoise.py::test_a_second_generate_of_the_same_bucket_compiles_nothing \
	denoise.py::test_the_loop_on_the_device_equals_single_steps \
	prefill.py::test_scores_are_the_defined_ones prefill.py::test_independent_encoding_is_the_defined_one \
	encoding.py::test_kept_tokens_are_the_defined_ones \
	encoding.py::test_query_conditioned_encoding_is_the_defined_one)
ifeq ($(PYTHON_KERNELS),)
env-kernels test-kernels test-gpu:
	@echo 'skipped: no Python 3.12 or newer here (set PYTHON_KERNELS=); the kernel needs it'
else
env-kernels: $(VENV_KERNELS)/.installed

test-kernels: env-kernels
	$(VENV_KERNELS)/bin/python -m pytest $(PARALLEL) $(KERNELS) $(PYTEST_ARGS)

test-gpu: env-kernels
	$(VENV_KERNELS)/bin/python $(INSTALL) -e '.[cuda]'
	JAX_PLATFORMS=cuda,cpu $(VENV_KERNELS)/bin/python -m pytest -m gpu $(PYTEST_ARGS)
endif

# Environments are made in .cache/versions; VERSIONS="3.13:highest" for some of them.
VERSIONS ?=
test-versions:
	scripts/test_versions $(ALL) .cache/versions $(VERSIONS)

# Of the tests that are about the packages, not of those about scripts, which run much of them by the
# way; and without those of a full disk, which coverage itself can't write to. The kernels' bodies count
# when Pallas traces them, on Python 3.12.
NOT_COVERAGE := --ignore=tests/scripts --ignore=tests/small_model --ignore=tests/test_docs.py \
	--deselect=tests/storage/test_atomic.py::test_full_disk
coverage: env env-kernels
	mkdir -p .cache/coverage
	$(VENV)/bin/python -m pytest --cov --cov-report= $(NOT_COVERAGE) $(PYTEST_ARGS)
	COVERAGE_CORE=sysmon $(VENV_KERNELS)/bin/python -m pytest --cov --cov-report= --cov-append $(KERNELS) \
		$(PYTEST_ARGS)
	$(VENV)/bin/python -m coverage report --show-missing --skip-covered
	@for each in pdllm_jax pallas_kernels convert; do printf '%s, percent: ' $$each; $(VENV)/bin/python \
		-m coverage report --include="$$each/*" --format=total --fail-under=90 || exit 1; done

lint: env
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

format: env
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

quickstart: env
	$(VENV)/bin/python scripts/quickstart.py

# Goes on where it was stopped; another folder: make ablate-quick ABLATE_OUT=DIR
ABLATE_OUT ?= .cache/ablate-quick
ablate-quick: env
	$(VENV)/bin/python scripts/ablate.py run --quick --out $(ABLATE_OUT) --time-limit 540

reproduce-quick: env
	$(VENV)/bin/python -m pytest -m slow tests/scripts/test_reproduce.py $(PYTEST_ARGS)

# Random damage to snapshots and stores, 1,000 examples a test.
fuzz: env
	$(VENV)/bin/python -m pytest tests/storage/test_damage.py --hypothesis-profile=fuzz $(PYTEST_ARGS)

kills: env
	$(VENV)/bin/python scripts/kills.py 100

clean:
	rm -rf $(VENV) $(VENV_KERNELS) .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis
