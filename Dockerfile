# syntax=docker/dockerfile:1
# The server with its embedded model. The registry and the converted model live in volumes.
FROM python:3.11-slim-bookworm AS build
WORKDIR /src
RUN python -m venv /opt/steerserve
ENV PATH=/opt/steerserve/bin:$PATH
COPY constraints ./constraints
COPY pyproject.toml README.md LICENSE ./
COPY server ./server
COPY interventions ./interventions
COPY steering ./steering
RUN pip install --no-cache-dir --constraint constraints/constraints.txt '.[embedded]' \
    && pip install --no-cache-dir --no-deps --require-hashes --requirement constraints/embedded.txt

FROM python:3.11-slim-bookworm
RUN useradd --create-home --uid 10001 steerserve \
    && mkdir -p /data/registry /data/cache \
    && chown -R steerserve:steerserve /data
COPY --from=build /opt/steerserve /opt/steerserve
ENV PATH=/opt/steerserve/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    STEERSERVE_HOST=0.0.0.0 \
    STEERSERVE_REGISTRY=/data/registry \
    STEERSERVE_CACHE=/data/cache
USER 10001
WORKDIR /home/steerserve
VOLUME ["/data"]
EXPOSE 8000
# The first start converts the embedded model, about half a minute.
HEALTHCHECK --interval=10s --timeout=3s --start-period=120s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/ready', timeout=2)"]
ENTRYPOINT ["steerserve"]
CMD ["serve"]
