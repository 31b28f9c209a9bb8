# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
VLLM_VENV := .venv-vllm
# The base model and the demo's data are fetched once into this folder.
export FEDLLM_CACHE ?= $(CURDIR)/.cache/fedllm
export OMP_WAIT_POLICY ?= passive
export HF_HUB_DISABLE_TELEMETRY = 1

.PHONY: demo test test-vllm explore check bench e2e format clean

$(STAMP): pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

# vLLM on a CPU for `python -m benchmarks.serving --with-vllm`: its pins exclude Flower's. The three packages taken
# out again are built for another torch; with them vLLM's imports fail.
$(VLLM_VENV)/.installed: tests/vllm/requirements.txt
	@test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --only-binary :all: -r $<
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

demo: $(STAMP)  ## Four owners, a coordinator and an endpoint as real processes: trains, serves, prints a table
	$(BIN)/fedllm demo $(DEMO_FLAGS)

test: $(STAMP)  ## Every test that ends within 12 minutes on two cores, real processes included
	$(BIN)/python -m pytest -q -n 2 --dist worksteal tests plugins --ignore tests/slow

# fedllm's own pins of cbor2 hold there, those of its command line (rich, typer) do not: vLLM brings newer ones, and
# the plugin uses neither.
$(VLLM_VENV)/.resolver: $(VLLM_VENV)/.installed pyproject.toml plugins/vllm-resolver/pyproject.toml
	$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check 'cbor2>=5.6,<6' 'sqlalchemy>=2.0.45,<3'
	$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e . -e plugins/vllm-resolver
	@touch $@

test-vllm: $(STAMP) $(VLLM_VENV)/.resolver  ## Two real vLLM servers on this CPU behind a router: about four minutes, not in CI
	$(BIN)/python -m pytest -q plugins/vllm-resolver/tests
	FEDLLM_TEST_VLLM=1 $(BIN)/python -m pytest -q -s tests/vllm --timeout 1200

explore: $(STAMP)  ## The property tests with new random examples: what they find becomes a fixed one
	HYPOTHESIS_PROFILE=explore $(BIN)/python -m pytest -q -n 2 --dist worksteal tests/unit tests/property tests/protocol

check: $(STAMP)  ## ruff, strict typing, import floors, lean imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -q tests/check

e2e: $(STAMP)  ## The slow suite: the whole demo with the real base model, checked field by field
	$(BIN)/python -m pytest -q tests/slow --timeout 2400

bench: $(STAMP)  ## Benchmarks, each gated by a correctness check
	$(BIN)/python -m benchmarks --quick

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(VLLM_VENV) build *.egg-info
