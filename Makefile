# Everything that a person or CI does here. Each target sets up what it needs by itself.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3; do command -v $$python && break; done)
VENV := .venv
BIN := $(VENV)/bin
# uv installs what the lock names; its own version is that of the lock.
UV_VERSION := $(shell sed -n 's/^uv==\([0-9.]*\).*/\1/p' requirements.lock)
SETUP := $(VENV)/.complete
TORCH := .venv-torch

.PHONY: help
help: ## Show this help
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | column -t -s '|'

.PHONY: setup
setup: $(SETUP) ## Install everything into .venv, from requirements.lock

$(SETUP): pyproject.toml requirements.lock
	@$(PYTHON) -c "import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))" || { echo "Python 3.11, 3.12 or 3.13 is needed: make PYTHON=/path/to/python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	VIRTUAL_ENV=$(VENV) $(BIN)/uv pip install --quiet --system-certs --compile-bytecode --constraint requirements.lock --editable '.[cpu,local,demo]' --group dev
	touch $@

.PHONY: demo
demo: $(SETUP) ## Train on real pictures of solar cells, with and without transfer, on an embedded S3
	$(BIN)/python examples/solar/demo.py

# Every system of the teaching documents from its example, every model of keras.applications, and a machine offline.
SYSTEMS := $(wildcard tests/end_to_end/test_example_*.py) tests/end_to_end/test_offline.py tests/training/test_families.py \
	tests/unit/test_describe_backbones.py tests/unit/test_model_backbones.py

# Stages that are killed and stopped.
KILLS := tests/chaos tests/end_to_end/test_stage_stops.py

.PHONY: test
test: $(SETUP) ## Run the tests, but for those of whole systems, of faults and of Prometheus
	$(BIN)/python -m pytest -n 2 --dist loadfile $(addprefix --ignore=,$(SYSTEMS) $(KILLS) tests/faults tests/monitoring)

.PHONY: test-systems
test-systems: $(SETUP) ## Run each example as its user would, and the models of keras.applications
	$(BIN)/python -m pytest -n 2 --dist loadfile $(SYSTEMS)

.PHONY: test-chaos
test-chaos: $(SETUP) ## Kill and stop stages, and let storage fail in every way [TOPWORK_LONG=1 ten times as often]
	$(MAKE) -j 2 test-kills test-faults

.PHONY: test-kills
test-kills: $(SETUP) ## Kill and stop stages at random moments, and compare what they leave
	$(BIN)/python -m pytest -s $(KILLS)

.PHONY: test-faults
test-faults: $(SETUP) ## Let storage fail in every way at every stage [TOPWORK_LONG=1 and measure memory]
	$(BIN)/python -m pytest -s tests/faults

.PHONY: test-monitoring
test-monitoring: $(SETUP) ## Let a real Prometheus scrape a real run, and ask it every query of dashboards and alerts
	@command -v promtool >/dev/null || { echo "make test-monitoring needs prometheus and promtool: install them, on Debian or Ubuntu with make prometheus."; exit 1; }
	$(BIN)/python -m pytest -s tests/monitoring

.PHONY: test-image
test-image: $(SETUP) ## Build the image and run the containers of a rendered Job with podman
	$(BIN)/python -m pytest -m image tests/image

.PHONY: test-cluster
test-cluster: $(SETUP) ## Run the tests in the cluster that KUBECONFIG names, with the image TOPWORK_IMAGE
	@test -n "$${KUBECONFIG:-}$${KUBERNETES_SERVICE_HOST:-}" || { echo "make test-cluster needs a cluster: set KUBECONFIG to an administrator's kubeconfig, and load the image into the nodes (CONTRIBUTING.md names all that can be set)."; exit 1; }
	$(BIN)/python -m pytest -m cluster tests/cluster

.PHONY: check
check: $(SETUP) ## Lint, types, import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint Dockerfile

.PHONY: generate
generate: $(SETUP) ## Write everything that is generated
	$(BIN)/python docs/generate.py
	$(BIN)/python k8s/generate.py
	$(BIN)/python charts/generate.py

.PHONY: goldens
goldens: $(SETUP) ## Write anew what the tests compare rendered objects with; read the diff
	TOPWORK_WRITE_GOLDENS=1 $(BIN)/python -m pytest -q tests/kubernetes/test_render_golden.py

.PHONY: verify
verify: generate ## Prove that what is generated is up to date
	@git diff --exit-code --stat -- README.md charts docs k8s schema || { echo "Generated files were out of date: commit what make generate wrote."; exit 1; }

.PHONY: bench
bench: $(SETUP) ## Measure side by side with what a user would use instead
	$(BIN)/python benchmarks/run.py

.PHONY: bench-cache
bench-cache: $(SETUP) ## Measure the feature cache beside the plain Keras script: half an hour on two cores
	$(BIN)/python benchmarks/cache.py

.PHONY: bench-train
bench-train: $(SETUP) $(TORCH)/.complete ## Measure training of all layers beside plain Keras, and PyTorch with timm
	$(BIN)/python benchmarks/train.py --torch $(TORCH)/bin/python

# 5 GB: what PyPI has of PyTorch for Linux brings CUDA with it.
$(TORCH)/.complete: benchmarks/torch.lock | $(SETUP)
	test -x $(TORCH)/bin/python || $(PYTHON) -m venv $(TORCH)
	VIRTUAL_ENV=$(TORCH) $(BIN)/uv pip install --quiet --system-certs --require-hashes --requirement benchmarks/torch.lock
	touch $@

# What `topwork render` names where no other image is asked for.
ACCELERATOR ?= gpu
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
IMAGE ?= topwork:$(VERSION)-$(ACCELERATOR)
BUILDER = $(shell docker info >/dev/null 2>&1 && echo docker || command -v podman || command -v buildah)

.PHONY: image
# CA: a bundle of certificates to trust; PIP_CONF and UV_CONF: a pip.conf and a uv.toml that say where packages come
# from. These leave no trace in the image. BASE: the Python image in another registry; SOURCE: the address of this code.
# BUILD_OPTIONS: whatever else the builder shall be told, such as --network=host or --platform.
image: ## Build the image: [ACCELERATOR=cpu] [IMAGE=name:tag] [CA=bundle.pem] [BASE=image]
	@test "$(ACCELERATOR)" = gpu || test "$(ACCELERATOR)" = cpu || { echo "ACCELERATOR is $(ACCELERATOR): expected gpu or cpu."; exit 1; }
	@test -n "$(BUILDER)" || { echo "Neither docker (with its engine running) nor podman nor buildah is here: install one of them, on Debian or Ubuntu with make podman."; exit 1; }
	DOCKER_BUILDKIT=1 $(BUILDER) build --tag $(IMAGE) --build-arg ACCELERATOR=$(ACCELERATOR) --build-arg VERSION=$(VERSION) \
		--build-arg REVISION="$$(git describe --always --dirty --abbrev=40 --exclude="*" 2>/dev/null)" \
		$${CA:+--secret "id=ca,src=$$CA"} $${PIP_CONF:+--secret "id=pip,src=$$PIP_CONF"} $${UV_CONF:+--secret "id=uv,src=$$UV_CONF"} \
		$${BASE:+--build-arg "BASE=$$BASE"} $${SOURCE:+--build-arg "SOURCE=$$SOURCE"} $(BUILD_OPTIONS) .

.PHONY: podman
podman: ## Install what make test-image needs (Debian, Ubuntu)
	@command -v apt-get >/dev/null || { echo "make podman knows apt-get alone. Install podman and runc with the tools of this system."; exit 1; }
	which podman runc debootstrap >/dev/null || { sudo=$$(test "$$(id -u)" = 0 || echo sudo); $$sudo apt-get update --quiet; \
		$$sudo env DEBIAN_FRONTEND=noninteractive apt-get install --quiet --yes podman runc debootstrap; }

.PHONY: prometheus
prometheus: ## Install what make test-monitoring needs (Debian, Ubuntu)
	@command -v apt-get >/dev/null || { echo "make prometheus knows apt-get alone. Install prometheus and its pushgateway with the tools of this system."; exit 1; }
	which prometheus promtool prometheus-pushgateway >/dev/null || { sudo=$$(test "$$(id -u)" = 0 || echo sudo); $$sudo apt-get update --quiet; \
		$$sudo env DEBIAN_FRONTEND=noninteractive apt-get install --quiet --yes --no-install-recommends prometheus prometheus-pushgateway; }

.PHONY: lock
lock: $(SETUP) ## Resolve the locks anew (hashed, universal, without any index address)
	$(BIN)/uv pip compile --system-certs pyproject.toml --all-extras --group dev --universal --python-version 3.11 \
		--generate-hashes --no-emit-index-url --quiet --output-file requirements.lock
	$(BIN)/uv pip compile --system-certs benchmarks/torch.in --python-platform linux --python-version 3.11 \
		--generate-hashes --no-emit-index-url --quiet --output-file benchmarks/torch.lock

.PHONY: clean
clean: ## Remove what was built
	rm -rf $(VENV) $(TORCH) .pytest_cache .mypy_cache .ruff_cache .hypothesis dist build
