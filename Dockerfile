# The server as an image, from the pinned versions of requirements/lock.txt:
#   docker build -t hyperbagel .                                    CPU
#   docker build -t hyperbagel:cuda --build-arg VARIANT=cuda .      NVIDIA GPUs (the host needs its driver and the container toolkit)
#   docker run --rm -p 8000:8000 -e HYPERBAGEL_API_KEY=KEY hyperbagel
# More: docs/deploy.md
ARG PYTHON=3.11-slim-bookworm
ARG VARIANT=cpu

# torch is installed first and alone: its version comes from the lock, its build from the variant.
FROM python:${PYTHON} AS base
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1
WORKDIR /opt/hyperbagel
COPY requirements requirements

FROM base AS torch-cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --index-url "$TORCH_INDEX" "$(grep '^torch==' requirements/lock.txt)"

# PyPI's wheels bring the CUDA libraries with them.
FROM base AS torch-cuda
RUN pip install "$(grep '^torch==' requirements/lock.txt)"

FROM torch-${VARIANT} AS app
# EXTRAS=[scale] adds Ray for --replicas, [quantized] bitsandbytes for --dtype nf4. The locks list more than a server needs, so they
# serve as constraints and are not installed whole.
ARG EXTRAS=""
COPY pyproject.toml README.md LICENSE ./
COPY hyperbagel hyperbagel
RUN pip install -c requirements/lock.txt setuptools \
    && pip install -c requirements/lock.txt -c requirements/scale.txt --no-build-isolation ".${EXTRAS}" \
    && useradd --create-home --uid 1000 hyperbagel
USER hyperbagel
# Outside the sources, so that the installed package is the one that runs.
WORKDIR /home/hyperbagel
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=120s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
# Exec form: SIGTERM reaches the server itself, which then finishes what it has accepted.
ENTRYPOINT ["hyperbagel"]
CMD ["serve", "--host", "0.0.0.0"]
