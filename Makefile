# Every command of this project; `make help` lists them. CI calls the same targets.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Tests at once: most of them wait for processes and pods more than they compute. In the order of
# the folders: the cluster's wait longest, so they begin first.
JOBS ?= 4
# Where `make soak` looks for tests.
SOAK ?= tests/trainer tests/operator tests/faults
STAMP := $(VENV)/.installed

.PHONY: help
help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-12s %s\n", $$1, $$2}'

$(STAMP): pyproject.toml constraints.txt
	@PYTHON=$(PYTHON) bash scripts/venv.sh $(VENV)
	@touch $@

.PHONY: venv
venv: $(STAMP) ## make .venv with everything that development needs

# Where PYTHONDONTWRITEBYTECODE is set, every process of the tests would compile what it runs.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: compiled
compiled: $(STAMP)
	@$(BIN)/python -m compileall -q operator trainer tests

.PHONY: demo
demo: compiled ## train on this machine, lose a server half-way, recover, and say what it cost
	@$(BIN)/daruma run manifests/examples/mlr.yaml --out runs/mlr --kill server-1@step=200

.PHONY: test
test: compiled parts ## every test, a real cluster included
	@$(BIN)/pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

.PHONY: machine
machine: ## what the test cluster needs from the system (apt packages, when root)
	@bash tests/cluster/harness/setup.sh

# Before the tests, whose time is limited: the first time it takes a while.
.PHONY: parts
parts: $(STAMP) machine
	@$(BIN)/python tests/cluster/harness/parts.py

.PHONY: check
check: $(STAMP) ## format, lint, types, imports
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

.PHONY: format
format: $(STAMP) ## write the format that `check` asks for
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

.PHONY: unit
unit: $(STAMP) ## the tests that take milliseconds
	@$(BIN)/pytest tests/operator tests/trainer

.PHONY: faults
faults: compiled ## the tests that kill processes
	@$(BIN)/pytest tests/faults

.PHONY: cluster
cluster: compiled parts ## the tests on a real Kubernetes
	@$(BIN)/pytest tests/cluster

.PHONY: kind-test
kind-test: $(STAMP) ## the same on a kind cluster (needs docker and kind)
	@bash tests/cluster/harness/kind.sh $(BIN)/pytest tests/cluster

.PHONY: soak
soak: $(STAMP) ## what is random, tried very often; hours, outside CI; SOAK=tests/… does a part
	@DARUMA_SOAK=1 PYTHONPATH=tests $(BIN)/pytest -n $(JOBS) --dist worksteal -p soak --soak-page docs/benchmarks/soak.md \
		--timeout 7200 $(SOAK)

.PHONY: bench
bench: $(STAMP) machine ## times and costs, written to docs/benchmarks/; hours
	@$(BIN)/daruma bench rework --write docs/benchmarks/rework.md
	@$(BIN)/daruma bench replay --write docs/benchmarks/replay.md
	@$(BIN)/daruma bench availability --write docs/benchmarks/availability.md
	@$(BIN)/daruma bench memory --write docs/benchmarks/memory.md
	@$(BIN)/daruma bench replication --write docs/benchmarks/replication.md
	@$(BIN)/daruma bench recovery --write docs/benchmarks/recovery.md
	@$(BIN)/daruma bench recovery --placement Adopt --write docs/benchmarks/recovery-adopt.md
	@$(BIN)/daruma bench recovery --placement Chain --write docs/benchmarks/recovery-chain.md
	@OMP_NUM_THREADS=1 $(BIN)/python tests/s3_server.py bench \
		$(BIN)/daruma bench checkpoint --store directory --store s3://bench --write docs/benchmarks/checkpoint.md
	@$(BIN)/python tests/cluster/harness/bench.py --write docs/benchmarks/recovery-cluster.md
	@$(BIN)/python tests/cluster/harness/bench.py --placement Adopt --write docs/benchmarks/recovery-cluster-adopt.md
	@$(BIN)/python tests/cluster/harness/bench.py --placement Chain --write docs/benchmarks/recovery-cluster-chain.md

.PHONY: manifests
manifests: $(STAMP) machine ## write what is made from the types and the chart: CRD, guide, install.yaml
	@$(BIN)/python -m daruma_operator.api.crd > manifests/crd.yaml.new
	@mv manifests/crd.yaml.new manifests/crd.yaml
	@cp manifests/crd.yaml charts/daruma/crds/crd.yaml
	@$(BIN)/python -m daruma_operator.api.reference > docs/guides/trainingjob.md.new
	@mv docs/guides/trainingjob.md.new docs/guides/trainingjob.md
	@$(BIN)/python tests/cluster/harness/render.py > manifests/install.yaml.new
	@mv manifests/install.yaml.new manifests/install.yaml

.PHONY: images
images: $(STAMP) machine ## build the images of operator, server and worker for the test cluster
	@$(BIN)/python tests/cluster/harness/parts.py images

.PHONY: docs
docs: $(STAMP) ## check the links and commands that the documents name
	@$(BIN)/pytest tests/test_docs.py

.PHONY: clean
clean: ## remove what was built here, but not the cache that checkouts share
	@rm -rf $(VENV) runs build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
