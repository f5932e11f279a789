# maskgit_pl from its wheel, as a user without rights.
#
#   docker build --tag maskgit .                                            # CUDA build of torch
#   docker build --tag maskgit:cpu --build-arg TORCH=https://download.pytorch.org/whl/cpu .
#   docker run --rm --volume "$PWD:/work" --user "$(id -u):$(id -g)" maskgit:cpu sample fashion-mnist-demo --out sampled.png
#
# A GPU: docker run --gpus all --shm-size 8g ...; workers of the data loader share memory in /dev/shm.
# A cluster: apptainer build maskgit.sif docker-daemon:maskgit:latest
ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS build
WORKDIR /source
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:${PYTHON}-slim
ARG TORCH=
ENV HOME=/tmp MPLCONFIGDIR=/tmp/matplotlib PYTHONUNBUFFERED=1
# hadolint ignore=DL3013  # the wheel is the one that was just built
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    pip install --no-cache-dir ${TORCH:+--extra-index-url "$TORCH"} /wheels/*.whl \
    && useradd --create-home --uid 1000 maskgit
USER 1000
WORKDIR /work
ENTRYPOINT ["maskgit"]
CMD ["--help"]
