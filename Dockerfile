# syntax=docker/dockerfile:1
# Two images from one recipe:
#   docker build --target api    -t forwardfill .         the API (and a worker on CPU); no CUDA
#   docker build --target worker -t forwardfill-worker .  the worker on GPU

ARG PYTHON=3.12

# What runs. The user owns nothing but the data folder, so the root file system can be mounted read-only.
FROM python:${PYTHON}-slim AS runtime
RUN groupadd --gid 10001 forwardfill \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /data --shell /usr/sbin/nologin forwardfill \
 && install --directory --owner=forwardfill --group=forwardfill /data
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    FORWARDFILL_DATA=/data
WORKDIR /data
VOLUME /data
STOPSIGNAL SIGTERM

# What is installed: the list that .dockerignore lets in.
FROM scratch AS source
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY gallery gallery
COPY models models
COPY migrations migrations
COPY workers workers
COPY service service
COPY forwardfill forwardfill

# What builds. Only its virtual environment reaches the images.
FROM python:${PYTHON}-slim AS build
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH \
    PIP_CACHE_DIR=/var/cache/pip \
    PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
COPY constraints.txt ./

# torch comes first and alone, at the version of constraints.txt, so that its layer outlives changes of our code and its
# index is asked for nothing else. What it needs comes from PyPI with the rest.
FROM build AS build-api
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN --mount=type=cache,target=/var/cache/pip \
    pip install --no-deps --index-url "$TORCH_INDEX" "$(grep '^torch==' constraints.txt)"
COPY --from=source / ./
RUN --mount=type=cache,target=/var/cache/pip \
    pip install -c constraints.txt ".[postgres]"

# PyPI's torch brings the CUDA libraries along; the host needs only an NVIDIA driver (580 or later, for CUDA 13)
# and the NVIDIA container toolkit.
FROM build AS build-worker
ARG TORCH_INDEX=https://pypi.org/simple
RUN --mount=type=cache,target=/var/cache/pip \
    pip install --no-deps --index-url "$TORCH_INDEX" "$(grep '^torch==' constraints.txt)"
COPY --from=source / ./
# Without the extra `gpu`: a worker transforms on a GPU and builds indexes on the CPU, for which faiss-gpu-cu12 knows no AVX.
RUN --mount=type=cache,target=/var/cache/pip \
    pip install -c constraints.txt ".[postgres]"

FROM runtime AS worker
COPY --from=build-worker /opt/venv /opt/venv
# For hosts whose container runtime reads these; Compose's device reservation says the same.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER forwardfill
CMD ["forwardfill", "worker"]

# The last stage is what a plain `docker build .` makes. Whether a container of it is well depends on its command, since a
# worker answers nobody: docker-compose.yml has the API's health check.
FROM runtime AS api
COPY --from=build-api /opt/venv /opt/venv
USER forwardfill
EXPOSE 8000
# Outside loopback the service starts only once a key exists (see README, "In production").
CMD ["forwardfill", "serve", "--no-worker", "--host", "0.0.0.0"]
