# tfserve in a container. The image holds no weights: mount a volume at /models, where they are downloaded once.
#
#   docker build -t tfserve:cuda .                                       # torch's wheel with CUDA
#   docker build -t tfserve --build-arg TORCH_ARGS="--index-url URL" .   # URL: PyTorch's index of CPU wheels, 5 GB less
#   docker run --rm -v models:/models tfserve demo-model                 # once: prepares the demo model
#   docker run --rm -p 8000:8000 -v models:/models tfserve               # serves it
#   docker run --rm --gpus all -p 8000:8000 -v models:/models tfserve:cuda serve Qwen/Qwen2.5-7B-Instruct --server.host 0.0.0.0
#
# It was written and linted (hadolint) where there is no Docker daemon: nobody has built it there.

ARG PYTHON=3.12

FROM python:${PYTHON}-slim-bookworm AS build

# The package index's torch brings CUDA, and runs on a CPU too. EXTRAS: "cuda" adds flash-attn, which wants a compiler if
# the index has no wheel for this torch (without it, torch's own kernels are used).
ARG TORCH=torch==2.13.0
ARG TORCH_ARGS=""
ARG EXTRAS=grammar,gguf

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/tfserve
ENV PATH=/opt/tfserve/bin:$PATH

# Before the source: a change of the source does not bring torch again. The lock has the versions that were tested.
COPY locks/main.txt /opt/lock.txt
# hadolint ignore=DL3013,SC2086
RUN pip install --constraint /opt/lock.txt ${TORCH_ARGS} "${TORCH}" \
    && python -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > /opt/constraints.txt

WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY tfserve ./tfserve
# The two variables hold the build backend to the lock too; which of them counts depends on pip's version.
RUN PIP_CONSTRAINT=/opt/lock.txt PIP_BUILD_CONSTRAINT=/opt/lock.txt \
    pip install --constraint /opt/constraints.txt ".[${EXTRAS}]"

FROM python:${PYTHON}-slim-bookworm

RUN groupadd --gid 10001 tfserve \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /models tfserve \
    && install --directory --owner=10001 --group=10001 /models
COPY --from=build /opt/tfserve /opt/tfserve

ENV PATH=/opt/tfserve/bin:$PATH \
    HOME=/models \
    HF_HOME=/models \
    TFSERVE_CACHE=/models/tfserve \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1

USER 10001:10001
WORKDIR /models
VOLUME /models
EXPOSE 8000
# SIGTERM drains: streams have server.drain_timeout to end. `docker stop` gives 10 s unless told otherwise (--time).
STOPSIGNAL SIGTERM
# 503 while the model loads (--start-period forgives that) and once the engine is dead or stuck.
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m --retries=3 \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health', timeout=4)"]

ENTRYPOINT ["tfserve"]
CMD ["serve", "demo", "--server.host", "0.0.0.0", "--max-model-len", "2048"]
