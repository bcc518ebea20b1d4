# One image for every role: `docker run ... interplay api | worker | migrate | serve`.
#   docker build -t interplay .                                                            for CPUs
#   docker build -t interplay:cuda --build-arg TORCH_INDEX=https://pypi.org/simple .       for CUDA
FROM python:3.11-slim AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# `worker,traces` adds OpenTelemetry, `worker,transformers` a family of networks; timm and torchvision want the torch of
# PyPI, as for CUDA.
ARG EXTRAS=worker
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/interplay
WORKDIR /source
COPY requirements.lock ./
# torch alone comes from another index; its dependencies come with the rest, and all at the versions of the lock.
RUN /opt/interplay/bin/pip install --no-deps --index-url "$TORCH_INDEX" "$(grep '^torch==' requirements.lock)"
COPY . .
RUN /opt/interplay/bin/pip install --constraint requirements.lock . "./server[$EXTRAS]"

FROM python:3.11-slim AS runtime
RUN useradd --uid 10001 --create-home interplay && install --directory --owner=interplay --group=interplay /data
COPY --from=build /opt/interplay /opt/interplay
# On 0.0.0.0 the service refuses to start without INTERPLAY_API_KEY.
ENV PATH=/opt/interplay/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    INTERPLAY_DATA_DIR=/data \
    INTERPLAY_HOST=0.0.0.0 \
    INTERPLAY_PORT=8321
USER interplay
WORKDIR /home/interplay
VOLUME /data
EXPOSE 8321
# A proxy from the environment is for other machines, so the check goes round it.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as r; r.build_opener(r.ProxyHandler({})).open('http://127.0.0.1:' + os.environ['INTERPLAY_PORT'] + '/healthz', timeout=4)"]
ENTRYPOINT ["interplay"]
CMD ["api"]
