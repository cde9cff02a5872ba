# syntax=docker/dockerfile:1
# The server with its embedded model. The registry lives in the volume /data, models in /cache.
# torch is PyPI's wheel, which brings CUDA and runs without it too: docker run --gpus all.
FROM python:3.11-slim-bookworm AS build
WORKDIR /src
RUN python -m venv /opt/steerserve
ENV PATH=/opt/steerserve/bin:$PATH
# First what changes seldom: the dependencies are a layer of their own, which new sources leave be.
COPY constraints ./constraints
COPY pyproject.toml ./
RUN mkdir server interventions steering \
    && touch README.md LICENSE \
    && pip install --no-cache-dir --constraint constraints/constraints.txt '.[embedded,otel]' \
    && pip install --no-cache-dir --no-deps --require-hashes --requirement constraints/embedded.txt
COPY README.md LICENSE ./
COPY server ./server
COPY interventions ./interventions
COPY steering ./steering
RUN pip install --no-cache-dir --no-deps --force-reinstall .

FROM python:3.11-slim-bookworm
LABEL org.opencontainers.image.title="steerserve" \
      org.opencontainers.image.description="An OpenAI-compatible server that steers a language model, per request" \
      org.opencontainers.image.licenses="Apache-2.0"
# torch.compile needs them at run time: a C++ compiler on the CPU, and on CUDA a C compiler for Triton.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 steerserve \
    && mkdir /data /cache \
    && chown steerserve:steerserve /data /cache
COPY --from=build /opt/steerserve /opt/steerserve
COPY --chmod=755 docker/with-admin-key.sh /usr/local/bin/with-admin-key
ENV PATH=/opt/steerserve/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    STEERSERVE_HOST=0.0.0.0 \
    STEERSERVE_REGISTRY=/data/registry \
    STEERSERVE_CACHE=/cache/steerserve \
    HF_HOME=/cache/huggingface \
    TORCHINDUCTOR_CACHE_DIR=/cache/inductor \
    TRITON_CACHE_DIR=/cache/triton
USER 10001
WORKDIR /home/steerserve
VOLUME ["/data", "/cache"]
EXPOSE 8000
# The first start converts the embedded model, about half a minute, or downloads one: which may take
# long, and compose gives up on what is unhealthy. The period ends with the first success.
HEALTHCHECK --interval=5s --timeout=3s --start-period=3600s \
    CMD ["python", "-c", "import os, urllib.request; urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f\"http://127.0.0.1:{os.environ.get('STEERSERVE_PORT') or 8000}/ready\", timeout=2)"]
ENTRYPOINT ["steerserve"]
CMD ["serve"]
