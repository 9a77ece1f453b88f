# A job in a container: elastic-ckpt is PID 1, hears the signals and reaps what it is given.
#
#   docker build --tag elastic-ckpt .
#   docker run --gpus all --shm-size 64g --stop-timeout 120 --volume /data/gpt:/data/gpt \
#       elastic-ckpt run --config /data/gpt/job.toml
#
# docs/kubernetes.md says what to mind: the grace, shared memory, and who runs a job again on 75.

FROM python:3.11-slim-bookworm AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY systemd systemd
COPY elastic_ckpt elastic_ckpt
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.11-slim-bookworm
LABEL org.opencontainers.image.title="elastic-ckpt" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.description="Training that survives its machines"
COPY --from=build /wheels /wheels
# obstore is the extra "bucket", for --dir URL and --mirror.
RUN pip install --no-cache-dir /wheels/*.whl "obstore>=0.10" \
    && useradd --create-home --uid 1000 elastic-ckpt
USER 1000:1000
WORKDIR /home/elastic-ckpt
# The exec form: a shell as PID 1 would not pass SIGTERM on.
ENTRYPOINT ["elastic-ckpt"]
CMD ["--help"]
STOPSIGNAL SIGTERM
