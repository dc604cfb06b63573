# Image of topwork for GPUs or, with ACCELERATOR=cpu, for CPUs. The target `controller` is the image of the controller,
# without TensorFlow and the S3 client.
#
#     make image [ACCELERATOR=cpu]        or        docker build --build-arg ACCELERATOR=cpu .
#     make image ACCELERATOR=controller   or        docker build --target controller .
#
# To build in a restricted network, set BASE to the Python image in another registry, and use build secrets, which are
# optional and not part of the image: ca (bundle of trusted CA certificates), pip (pip.conf) and uv (uv.toml).
ARG BASE=docker.io/library/python:3.11-slim-bookworm

# Requirements without tool settings, so that changes of these settings do not invalidate the layer with all packages.
FROM ${BASE} AS requirements
WORKDIR /source
COPY pyproject.toml requirements.lock ./
RUN sed --in-place '/^\[tool\./,$d' pyproject.toml

FROM ${BASE} AS uv
ENV PATH=/opt/topwork/bin:/opt/uv/bin:$PATH \
    # Both tools use the CA bundle of the system, which the ca secret can replace.
    PIP_CERT=/etc/ssl/certs/ca-certificates.crt \
    SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt \
    UV_LINK_MODE=copy \
    UV_PYTHON_DOWNLOADS=never \
    VIRTUAL_ENV=/opt/topwork \
    # Compile all bytecode here, because it cannot be cached in a read-only root file system. The sources never change, so
    # Python does not need to check them.
    PYC_INVALIDATION_MODE=UNCHECKED_HASH
WORKDIR /source
COPY --from=requirements /source ./
# Install uv with the version and the hashes in requirements.lock.
RUN --mount=type=secret,id=ca,target=/etc/ssl/certs/ca-certificates.crt \
    --mount=type=secret,id=pip,target=/etc/pip.conf \
    sed -n '/^uv==/,/[^\\]$/p' requirements.lock > /tmp/uv.txt \
    && python3 -m venv /opt/uv \
    && /opt/uv/bin/pip install --no-cache-dir --disable-pip-version-check --require-hashes --requirement /tmp/uv.txt \
    && python3 -m venv --without-pip "$VIRTUAL_ENV"

FROM uv AS dependencies
ARG ACCELERATOR=gpu
RUN --mount=type=secret,id=ca,target=/etc/ssl/certs/ca-certificates.crt \
    --mount=type=secret,id=uv,target=/etc/uv/uv.toml \
    --mount=type=cache,id=topwork-uv,target=/root/.cache/uv \
    uv pip install --require-hashes --constraint requirements.lock --compile-bytecode \
        --requirement pyproject.toml --extra "$ACCELERATOR" --extra tracking \
    # Headers for compiling custom ops: 290 MB, and the image has no compiler.
    && rm -rf "$VIRTUAL_ENV"/lib/python3*/site-packages/tensorflow/include

FROM uv AS controller-dependencies
RUN --mount=type=secret,id=ca,target=/etc/ssl/certs/ca-certificates.crt \
    --mount=type=secret,id=uv,target=/etc/uv/uv.toml \
    --mount=type=cache,id=topwork-uv,target=/root/.cache/uv \
    uv pip install --require-hashes --constraint requirements.lock --compile-bytecode \
        --requirement pyproject.toml --extra controller \
    # The controller does not access the storage.
    && uv pip uninstall boto3 botocore s3transfer jmespath \
    # The asynchronous client and the methods for each kind: 105 MB. topwork sends plain objects with ApiClient.
    && rm -rf "$VIRTUAL_ENV"/lib/python3*/site-packages/kubernetes/aio \
        "$VIRTUAL_ENV"/lib/python3*/site-packages/kubernetes/client/api

FROM uv AS package
COPY LICENSE README.md pyproject.toml ./
COPY services services
RUN --mount=type=secret,id=ca,target=/etc/ssl/certs/ca-certificates.crt \
    --mount=type=secret,id=uv,target=/etc/uv/uv.toml \
    --mount=type=cache,id=topwork-uv,target=/root/.cache/uv \
    uv build --wheel --require-hashes --build-constraint requirements.lock \
    && uv pip install --no-deps --no-index --compile-bytecode --prefix /package dist/*.whl

FROM ${BASE} AS runtime
# Debian serves only the latest version of a package: a pinned version disappears with the next security update.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends tini \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/apt /var/log/*.log \
    && groupadd --gid 65532 topwork \
    && useradd --uid 65532 --gid 65532 --no-log-init --home-dir /home/topwork --shell /usr/sbin/nologin topwork \
    && install --directory --owner 65532 --group 65532 /home/topwork \
    # Python images do not contain the bytecode of the standard library.
    && python3 -m compileall -qq -x /site-packages/ "$(python3 -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')"
ENV PATH=/opt/topwork/bin:$PATH \
    HOME=/home/topwork \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
USER 65532:65532
WORKDIR /home/topwork

FROM runtime AS controller
COPY --from=controller-dependencies /opt/topwork /opt/topwork
COPY --from=package /package /opt/topwork
ENTRYPOINT ["tini", "--", "topwork", "controller"]
ARG VERSION=""
ARG REVISION=""
ARG SOURCE=""
LABEL org.opencontainers.image.title="topwork-controller" \
    org.opencontainers.image.description="Controller of topwork: runs the TransferJobs of a Kubernetes cluster." \
    org.opencontainers.image.version="$VERSION" \
    org.opencontainers.image.revision="$REVISION" \
    org.opencontainers.image.source="$SOURCE" \
    org.opencontainers.image.licenses="Apache-2.0"

FROM runtime AS trainer
# Large dependencies that rarely change have their own layer, which nodes pull once for many versions of topwork.
COPY --from=dependencies /opt/topwork /opt/topwork
COPY --from=package /package /opt/topwork
# Driver libraries that the NVIDIA runtime mounts into GPU containers: CUDA and NVML.
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility
ENTRYPOINT ["tini", "--", "topwork"]
CMD ["--help"]
ARG ACCELERATOR=gpu
ARG VERSION=""
ARG REVISION=""
ARG SOURCE=""
LABEL org.opencontainers.image.title="topwork" \
    org.opencontainers.image.description="Transfer learning for image classifiers as a batch service on Kubernetes: one YAML job spec in, an evaluated model in object storage out." \
    org.opencontainers.image.version="$VERSION" \
    org.opencontainers.image.revision="$REVISION" \
    org.opencontainers.image.source="$SOURCE" \
    org.opencontainers.image.licenses="Apache-2.0" \
    dev.topwork.accelerator="$ACCELERATOR"
