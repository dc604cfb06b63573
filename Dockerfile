# The image of topwork, for GPUs, or with ACCELERATOR=cpu for processors.
#
#     make image [ACCELERATOR=cpu]        or        docker build --build-arg ACCELERATOR=cpu .
#
# A network of your own changes nothing here: BASE may name the Python image in another registry, and build secrets, all
# optional, leave no trace in the image: ca (bundle of certificates that are trusted), pip (a pip.conf) and uv (a uv.toml).
ARG BASE=docker.io/library/python:3.11-slim-bookworm

# What is installed, without the settings of the linters, at whose every change all would be installed anew.
FROM ${BASE} AS requirements
WORKDIR /source
COPY pyproject.toml requirements.lock ./
RUN sed --in-place '/^\[tool\./,$d' pyproject.toml

FROM ${BASE} AS dependencies
ARG ACCELERATOR=gpu
ENV PATH=/opt/topwork/bin:/opt/uv/bin:$PATH \
    # The system's bundle of certificates for both, so that the secret can take its place.
    PIP_CERT=/etc/ssl/certs/ca-certificates.crt \
    SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt \
    UV_LINK_MODE=copy \
    UV_PYTHON_DOWNLOADS=never \
    VIRTUAL_ENV=/opt/topwork \
    # A read-only root can't cache byte code, so all of it is compiled here; it needs no check against its sources, which
    # come along unchanged.
    PYC_INVALIDATION_MODE=UNCHECKED_HASH
WORKDIR /source
COPY --from=requirements /source ./
# uv in the version and with the hashes of the lock.
RUN --mount=type=secret,id=ca,target=/etc/ssl/certs/ca-certificates.crt \
    --mount=type=secret,id=pip,target=/etc/pip.conf \
    sed -n '/^uv==/,/[^\\]$/p' requirements.lock > /tmp/uv.txt \
    && python3 -m venv /opt/uv \
    && /opt/uv/bin/pip install --no-cache-dir --disable-pip-version-check --require-hashes --requirement /tmp/uv.txt
RUN --mount=type=secret,id=ca,target=/etc/ssl/certs/ca-certificates.crt \
    --mount=type=secret,id=uv,target=/etc/uv/uv.toml \
    --mount=type=cache,id=topwork-uv,target=/root/.cache/uv \
    python3 -m venv --without-pip "$VIRTUAL_ENV" \
    && uv pip install --require-hashes --constraint requirements.lock --compile-bytecode \
        --requirement pyproject.toml --extra "$ACCELERATOR" \
    # Headers to compile operations of one's own with: 290 MB, and no compiler is near.
    && rm -rf "$VIRTUAL_ENV"/lib/python3*/site-packages/tensorflow/include

FROM dependencies AS package
COPY LICENSE README.md pyproject.toml ./
COPY services services
RUN --mount=type=secret,id=ca,target=/etc/ssl/certs/ca-certificates.crt \
    --mount=type=secret,id=uv,target=/etc/uv/uv.toml \
    --mount=type=cache,id=topwork-uv,target=/root/.cache/uv \
    uv build --wheel --require-hashes --build-constraint requirements.lock \
    && uv pip install --no-deps --no-index --compile-bytecode --prefix /package dist/*.whl

FROM ${BASE}
# Debian serves only the newest version of a package: one that is named here is gone after the next security update.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends tini \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/apt /var/log/*.log \
    && groupadd --gid 65532 topwork \
    && useradd --uid 65532 --gid 65532 --no-log-init --home-dir /home/topwork --shell /usr/sbin/nologin topwork \
    && install --directory --owner 65532 --group 65532 /home/topwork \
    # Images of Python come without the byte code of its standard library.
    && python3 -m compileall -qq -x /site-packages/ "$(python3 -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')"
# A layer of its own for what is large and seldom changes: nodes pull it once for many versions of topwork.
COPY --from=dependencies /opt/topwork /opt/topwork
COPY --from=package /package /opt/topwork
# NVIDIA_DRIVER_CAPABILITIES: what NVIDIA's runtime hands to a container that is given a GPU, CUDA and NVML.
ENV PATH=/opt/topwork/bin:$PATH \
    HOME=/home/topwork \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
USER 65532:65532
WORKDIR /home/topwork
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
