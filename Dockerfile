# The service with SoftHSM beside it. A vendor's PKCS#11 module is mounted or added in an image of your own.
# Runs with a read-only root: everything that is written goes to /var/lib/kms-jwks (and /dev/shm).
# How to start it: config/compose.yaml.

FROM python:3.13-slim-bookworm AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
WORKDIR /src
COPY requirements/ requirements/
RUN python -m venv /opt/build \
    && /opt/build/bin/pip install --no-deps --require-hashes --requirement requirements/build.txt \
    && python -m venv /opt/kms-jwks \
    && /opt/kms-jwks/bin/pip install --no-deps --require-hashes --requirement requirements/run.txt
COPY pyproject.toml README.md LICENSE ./
COPY kms_jwks/ kms_jwks/
COPY config/ config/
COPY softhsm/ softhsm/
RUN /opt/build/bin/hatchling build --target wheel --directory /src/dist \
    && /opt/kms-jwks/bin/pip install --no-deps --no-index /src/dist/*.whl \
    && /opt/kms-jwks/bin/pip uninstall --yes pip

FROM python:3.13-slim-bookworm
# SoftHSM as the distribution has it: its security fixes come with the base image's.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends softhsm2 \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --system --gid 10001 kms-jwks \
    && useradd --system --uid 10001 --gid 10001 --no-create-home --home-dir /var/lib/kms-jwks kms-jwks \
    && install --directory --mode 0700 --owner 10001 --group 10001 /var/lib/kms-jwks
COPY --from=build /opt/kms-jwks /opt/kms-jwks
ENV PATH=/opt/kms-jwks/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    KMS_JWKS_BIND=0.0.0.0:8080 \
    KMS_JWKS_DATABASE_URL=sqlite:////var/lib/kms-jwks/registry.sqlite3 \
    KMS_JWKS_STATE_DIR=/var/lib/kms-jwks/state
WORKDIR /var/lib/kms-jwks
VOLUME /var/lib/kms-jwks
USER 10001:10001
EXPOSE 8080
HEALTHCHECK --interval=10s --timeout=3s --start-period=20s \
    CMD ["python", "-m", "kms_jwks.http.health"]
ENTRYPOINT ["kms-jwks"]
CMD ["serve"]
