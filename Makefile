# All tasks of developers and CI. Each target installs what it needs.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3; do command -v $$python && break; done)
VENV := .venv
BIN := $(VENV)/bin
# requirements.lock pins the version of uv, which installs all other packages.
UV_VERSION := $(shell sed -n 's/^uv==\([0-9.]*\).*/\1/p' requirements.lock)
SETUP := $(VENV)/.complete
TORCH := .venv-torch
LUDWIG := .venv-ludwig
MLFLOW := .venv-mlflow

.PHONY: help
help: ## Show this help
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | column -t -s '|'

.PHONY: setup
setup: $(SETUP) ## Create .venv with the packages in requirements.lock

$(SETUP): pyproject.toml requirements.lock
	@$(PYTHON) -c "import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))" || { echo "Python 3.11, 3.12 or 3.13 is required. Set its path: make PYTHON=/path/to/python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	VIRTUAL_ENV=$(VENV) $(BIN)/uv pip install --quiet --system-certs --compile-bytecode --constraint requirements.lock --editable '.[cpu,local,demo,controller,tracking]' --group dev
	touch $@

.PHONY: demo
demo: $(SETUP) ## Train on real images of solar cells with and without transfer, using an embedded S3 server
	$(BIN)/python examples/solar/demo.py

# Every example, every model of keras.applications, and offline use.
SYSTEMS := $(wildcard tests/end_to_end/test_example_*.py) tests/end_to_end/test_offline.py tests/training/test_families.py \
	tests/unit/test_describe_backbones.py tests/unit/test_model_backbones.py

# Tests that kill and stop stages.
KILLS := tests/chaos tests/end_to_end/test_stage_stops.py

# Training in several processes, as on several nodes.
NODES := tests/nodes tests/end_to_end/test_nodes.py tests/end_to_end/test_stage_nodes.py $(wildcard tests/unit/test_nodes_*.py) \
	tests/training/test_feature_nodes.py

# Tests of commands, manifests, chart and controller, with an API server over HTTP.
KUBERNETES := tests/kubernetes tests/chart

.PHONY: test
test: $(SETUP) ## Run all tests except those with a target of their own
	$(BIN)/python -m pytest -n 2 --dist loadfile \
		$(addprefix --ignore=,$(SYSTEMS) $(KILLS) $(KUBERNETES) $(NODES) tests/faults tests/monitoring tests/tracking)

.PHONY: test-kubernetes
test-kubernetes: $(SETUP) ## Test commands, manifests, chart and controller with an API server over HTTP
	$(BIN)/python -m pytest -n 2 --dist loadfile $(KUBERNETES)

.PHONY: test-nodes
test-nodes: $(SETUP) ## Train on several nodes, each a process, and compare with one node
	$(BIN)/python -m pytest -s $(NODES)

.PHONY: test-systems
test-systems: $(SETUP) ## Test every example and every model of keras.applications
	$(BIN)/python -m pytest -n 2 --dist loadfile $(SYSTEMS)

.PHONY: test-chaos
test-chaos: $(SETUP) ## Run test-kills and test-faults [TOPWORK_LONG=1 for ten times as many kills]
	$(MAKE) -j 2 test-kills test-faults

.PHONY: test-kills
test-kills: $(SETUP) ## Kill and stop stages at random times, and check that runs resume with the same results
	$(BIN)/python -m pytest -s $(KILLS)

.PHONY: test-faults
test-faults: $(SETUP) ## Inject storage faults into every stage [TOPWORK_LONG=1 also measures memory]
	$(BIN)/python -m pytest -s tests/faults

.PHONY: test-conversion
test-conversion: $(SETUP) $(TORCH)/.complete ## Compare converted models with PyTorch, torchvision and timm (20 minutes)
	directory=$$(mktemp -d) && trap 'rm -r "$$directory"' EXIT && \
		$(TORCH)/bin/python tests/conversion/timm_reference.py "$$directory" && \
		$(BIN)/python tests/conversion/compare_features.py "$$directory"

.PHONY: test-monitoring
test-monitoring: $(SETUP) ## Test every dashboard query and alert with a real Prometheus server and a real run
	@command -v promtool >/dev/null || { echo "make test-monitoring requires prometheus and promtool. On Debian or Ubuntu, install them with make prometheus."; exit 1; }
	$(BIN)/python -m pytest -s tests/monitoring

.PHONY: test-tracking
test-tracking: $(SETUP) $(MLFLOW)/.complete ## Follow runs with a real MLflow server and a real TensorBoard
	$(BIN)/python -m pytest -s tests/tracking

.PHONY: test-image
test-image: $(SETUP) ## Build the image and run the containers of a rendered Job with Podman
	$(BIN)/python -m pytest -m image tests/image

.PHONY: test-cluster
test-cluster: $(SETUP) ## Test in the cluster of KUBECONFIG with the images TOPWORK_IMAGE and TOPWORK_CONTROLLER_IMAGE [SMOKE=1 for 15 minutes instead of two hours]
	@test -n "$${KUBECONFIG:-}$${KUBERNETES_SERVICE_HOST:-}" || { echo "make test-cluster requires a cluster. Set KUBECONFIG to an administrator's kubeconfig, and make the images available on the nodes. CONTRIBUTING.md lists all settings."; exit 1; }
	$(BIN)/python -m pytest -m "cluster$(if $(SMOKE), and smoke)" tests/cluster

.PHONY: check
check: $(SETUP) ## Run linters, type checks and import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint Dockerfile

.PHONY: generate
generate: $(SETUP) ## Write all generated files
	$(BIN)/python docs/generate.py
	$(BIN)/python charts/generate.py
	$(BIN)/python k8s/generate.py

.PHONY: goldens
goldens: $(SETUP) ## Rewrite the golden files of rendered objects; review the diff
	TOPWORK_WRITE_GOLDENS=1 $(BIN)/python -m pytest -q tests/kubernetes/test_render_golden.py

.PHONY: verify
verify: generate ## Check that generated files are up to date
	@git diff --exit-code --stat -- README.md charts docs k8s schema || { echo "Generated files were out of date. Commit the changes that make generate has made."; exit 1; }

.PHONY: bench
bench: $(SETUP) ## Compare training speed with a plain Keras script
	$(BIN)/python benchmarks/run.py

.PHONY: bench-cache
bench-cache: $(SETUP) ## Compare the feature cache with a plain Keras script (30 minutes on two CPU cores)
	$(BIN)/python benchmarks/cache.py

.PHONY: bench-train
bench-train: $(SETUP) $(TORCH)/.complete ## Compare training of all layers with plain Keras, and with PyTorch and timm
	$(BIN)/python benchmarks/train.py --torch $(TORCH)/bin/python

.PHONY: bench-overhead
bench-overhead: $(SETUP) ## Show which part of the time of a small and a large job is not spent computing
	$(BIN)/python benchmarks/overhead.py

.PHONY: bench-search
bench-search: $(SETUP) ## Measure searches of the head against one run, and compare TPE with random search
	$(BIN)/python benchmarks/search.py

.PHONY: bench-ludwig
bench-ludwig: $(SETUP) $(LUDWIG)/.complete ## Compare a search of topwork with one of Ludwig
	$(BIN)/python benchmarks/ludwig_comparison.py --ludwig $(LUDWIG)/bin/python

.PHONY: bench-steps
bench-steps: $(SETUP) ## Compare training steps on the CPU with other memory allocators, threads and compilers
	$(BIN)/python benchmarks/steps.py
	$(BIN)/python benchmarks/steps.py --fit --models head:1280:32 MobileNetV2:96:32 --steps 40 --rounds 21

.PHONY: bench-scaling
bench-scaling: $(SETUP) ## Measure training steps of several nodes in network namespaces (as root), and predict larger clusters
	$(BIN)/python -m benchmarks.scaling

.PHONY: bench-transfers
bench-transfers: $(SETUP) ## Compare uploads and downloads with rclone on the same S3 server (needs 20 GB of disk space)
	@command -v rclone >/dev/null || { echo "make bench-transfers requires rclone. On Debian or Ubuntu, install it with apt-get install rclone."; exit 1; }
	$(BIN)/python benchmarks/transfers.py

.PHONY: bench-audit
bench-audit: $(SETUP) ## Measure what the audit of a dataset finds, and how long it takes
	for what in found labels speed pull; do $(BIN)/python benchmarks/audit.py $$what; done

.PHONY: bench-controller
bench-controller: $(SETUP) ## Count the requests of the controller at rest with 1,050 TransferJobs, and measure its memory
	PYTHONPATH=tests/kubernetes $(BIN)/python benchmarks/controller.py

.PHONY: bench-records
bench-records: $(SETUP) ## Compare read throughput of stored datasets with the array_record format
	$(BIN)/python benchmarks/records.py

# 5 GB: PyTorch for Linux on PyPI includes CUDA.
$(TORCH)/.complete: benchmarks/torch.lock | $(SETUP)
	test -x $(TORCH)/bin/python || $(PYTHON) -m venv $(TORCH)
	VIRTUAL_ENV=$(TORCH) $(BIN)/uv pip install --quiet --system-certs --require-hashes --requirement benchmarks/torch.lock
	touch $@

# 6 GB: it requires PyTorch, too, and Ray.
$(LUDWIG)/.complete: benchmarks/ludwig.lock | $(SETUP)
	test -x $(LUDWIG)/bin/python || $(PYTHON) -m venv $(LUDWIG)
	VIRTUAL_ENV=$(LUDWIG) $(BIN)/uv pip install --quiet --system-certs --require-hashes --requirement benchmarks/ludwig.lock
	touch $@

# The server requires another version of pyarrow than TFDS.
$(MLFLOW)/.complete: tests/tracking/mlflow.lock | $(SETUP)
	test -x $(MLFLOW)/bin/python || $(PYTHON) -m venv $(MLFLOW)
	VIRTUAL_ENV=$(MLFLOW) $(BIN)/uv pip install --quiet --system-certs --require-hashes --requirement tests/tracking/mlflow.lock
	touch $@

# Tag of the image that `topwork render` uses by default.
ACCELERATOR ?= gpu
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
IMAGE ?= topwork:$(VERSION)-$(ACCELERATOR)
# The controller has no accelerator; its image is a target of the same Dockerfile.
TARGET = $(if $(filter controller,$(ACCELERATOR)),--target controller,--build-arg ACCELERATOR=$(ACCELERATOR))
BUILDER = $(shell docker info >/dev/null 2>&1 && echo docker || command -v podman || command -v buildah)

.PHONY: image
# CA: bundle of trusted CA certificates. PIP_CONF and UV_CONF: pip.conf and uv.toml with package indexes. These files do
# not become part of the image. BASE: Python image in another registry. SOURCE: URL of the source repository.
# BUILD_OPTIONS: more options of the builder, such as --network=host or --platform.
image: ## Build the image: [ACCELERATOR=cpu|controller] [IMAGE=name:tag] [CA=bundle.pem] [BASE=image]
	@[[ "$(ACCELERATOR)" =~ ^(gpu|cpu|controller)$$ ]] || { echo "ACCELERATOR is $(ACCELERATOR): expected gpu, cpu or controller."; exit 1; }
	@test -n "$(BUILDER)" || { echo "No image builder found. Start the Docker engine, or install Podman or Buildah: on Debian or Ubuntu, with make podman."; exit 1; }
	DOCKER_BUILDKIT=1 $(BUILDER) build --tag $(IMAGE) $(TARGET) --build-arg VERSION=$(VERSION) \
		--build-arg REVISION="$$(git describe --always --dirty --abbrev=40 --exclude="*" 2>/dev/null)" \
		$${CA:+--secret "id=ca,src=$$CA"} $${PIP_CONF:+--secret "id=pip,src=$$PIP_CONF"} $${UV_CONF:+--secret "id=uv,src=$$UV_CONF"} \
		$${BASE:+--build-arg "BASE=$$BASE"} $${SOURCE:+--build-arg "SOURCE=$$SOURCE"} $(BUILD_OPTIONS) .

.PHONY: podman
podman: ## Install the requirements of make test-image (Debian, Ubuntu)
	@command -v apt-get >/dev/null || { echo "make podman requires apt-get. Install podman, runc and debootstrap with the package manager of this system."; exit 1; }
	which podman runc debootstrap >/dev/null || { sudo=$$(test "$$(id -u)" = 0 || echo sudo); $$sudo apt-get update --quiet; \
		$$sudo env DEBIAN_FRONTEND=noninteractive apt-get install --quiet --yes podman runc debootstrap; }

.PHONY: prometheus
prometheus: ## Install the requirements of make test-monitoring (Debian, Ubuntu)
	@command -v apt-get >/dev/null || { echo "make prometheus requires apt-get. Install prometheus and pushgateway with the package manager of this system."; exit 1; }
	which prometheus promtool prometheus-pushgateway >/dev/null || { sudo=$$(test "$$(id -u)" = 0 || echo sudo); $$sudo apt-get update --quiet; \
		$$sudo env DEBIAN_FRONTEND=noninteractive apt-get install --quiet --yes --no-install-recommends prometheus prometheus-pushgateway; }

.PHONY: lock
lock: $(SETUP) ## Update the lock files (universal, with hashes and without index URLs)
	$(BIN)/uv pip compile --system-certs pyproject.toml --all-extras --group dev --universal --python-version 3.11 \
		--generate-hashes --no-emit-index-url --quiet --output-file requirements.lock
	$(BIN)/uv pip compile --system-certs benchmarks/torch.in --python-platform linux --python-version 3.11 \
		--generate-hashes --no-emit-index-url --quiet --output-file benchmarks/torch.lock
	$(BIN)/uv pip compile --system-certs benchmarks/ludwig.in --python-platform linux --python-version 3.11 \
		--generate-hashes --no-emit-index-url --quiet --output-file benchmarks/ludwig.lock
	$(BIN)/uv pip compile --system-certs tests/tracking/mlflow.in --universal --python-version 3.11 \
		--generate-hashes --no-emit-index-url --quiet --output-file tests/tracking/mlflow.lock

.PHONY: clean
clean: ## Remove virtual environments, caches and build outputs
	rm -rf $(VENV) $(TORCH) $(LUDWIG) $(MLFLOW) .pytest_cache .mypy_cache .ruff_cache .hypothesis dist build
