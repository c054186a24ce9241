# make serve: install if needed, start the server.   make test: install if needed, run the tests.
BIN := .venv/bin
BENCH_MODEL := build/bench-model
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11 python; do \
  $$python -c '$(NEW_ENOUGH)' 2>/dev/null && echo $$python && break; done)

.PHONY: serve test mutants check sanitize install test-gpu bench reference triton clients

serve: install
	$(BIN)/dynamo-serve serve $(ARGS)

# In two processes, for two cores; ARGS="-n 0 ..." runs tests in one, where a debugger works.
test: install
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not gpu and not mutants" $(ARGS)

# Whether the tests of the core notice a core that is broken on purpose.
mutants: install
	$(BIN)/python -m pytest -m mutants $(ARGS)

check: install
	$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/mypy
	$(BIN)/python -m pytest tests/architecture

# The native kernels with address and undefined-behaviour sanitizers, under their own tests.
sanitize: install
	$(BIN)/python scripts/sanitize.py

test-gpu: install
	$(BIN)/python -m pytest -m gpu $(ARGS)

# Ours alone; ARGS="--vllm PATH --transformers PATH" alternates with these, each in its own environment.
bench: install
	test -d $(BENCH_MODEL) || $(BIN)/python -m bench.random_model --out $(BENCH_MODEL)
	$(BIN)/python -m bench.versus_peers $(BENCH_MODEL) $(ARGS)

# A real NVIDIA Triton server in an environment of its own, with triton_models/: docs/triton.md.
triton: install
	$(BIN)/python -m scripts.tritonserver $(ARGS)

# Client packages, unmodified, in environments of their own, for tests/clients: docs/clients.md.
clients: install
	$(BIN)/python -m scripts.clients

reference: install
	$(BIN)/python -m dynamo_serve.reference

install: .venv/installed

.venv/installed: requirements.lock pyproject.toml setup.py $(wildcard dynamo_serve/native/src/*)
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; set PYTHON=..." >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install $$(grep '^torch==' requirements.lock)
	$(BIN)/python -m pip install -r requirements.lock
	$(BIN)/python -m pip install --no-deps --no-build-isolation --editable .
	touch $@
