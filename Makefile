# make report   everything from set-up to the published report of params/quickstart.yaml
# make test     every test that needs nothing but Python
# make bench    how fast it is beside what you would run instead, into README.md, then the tests on a model of 135M parameters
#               (ROWS="--again train merge": these rows alone)
PYTHON ?= $(shell command -v python3.11 || command -v python3)
PARAMS ?= params/quickstart.yaml
BIN := .venv/bin
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
SLOW := { print } $$2 > 60 { print "error: " $$1 " takes over a minute beside another; alone it is to take 30 s"; slow = 1 } END { exit slow }

.PHONY: report test lab bench
report: .venv
	@$(BIN)/domain-adapt run $(PARAMS)

test: .venv
	@bash tests/notebooks_agree.sh
	@OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2 --skip_folder_re '^(stages|[._].*)$$' --timing | awk '$(SLOW)'
	@$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST)

lab: .venv
	@$(BIN)/jupyter lab nbs

.PHONY: .venv
.venv: .venv/installed

.venv/installed: requirements.txt pyproject.toml
	@[ -n "$(PYTHON)" ] && $(PYTHON) -c 'import sys; sys.exit(not (3, 11, 5) <= sys.version_info < (3, 12))' || { \
	  echo "error: Python 3.11 from 3.11.5 on is needed (regular expressions before it are faulty), and '$(PYTHON)' is $$($(PYTHON) --version 2>&1 || echo not there); name one with: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' || { echo "error: $(PYTHON) lacks venv; install it (Debian: python3.11-venv)" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	$(BIN)/python -m domain_adapt.kernel describe
	@touch $@

bench: .venv
	@$(BIN)/python tests/benchmarks/run.py $(ROWS)
	@$(if $(ROWS),,$(BIN)/python -m pytest -q -m real --run-real)
