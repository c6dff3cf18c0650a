# The GPU recipe in a container. torch's wheels carry CUDA, so the host needs NVIDIA's driver and container toolkit only.
#
#   docker build -t vmoe_momentum .
#   docker run --rm --gpus all --shm-size 8g -v /path/to/data:/app/data -v "$PWD/runs:/app/runs" vmoe_momentum \
#       fit --config configs/imagenet/vmoe_small_patch32.yaml --config configs/gpu.yaml
#
# Built and tried without a GPU (CONTRIBUTING.md says how): 9 GB, most of them torch's.
FROM debian:bookworm-slim

# python3.11 with headers, and what FFCV compiles against
RUN apt-get update \
    && apt-get install -y --no-install-recommends \
        ca-certificates python3 python3-dev python3-venv g++ pkg-config libturbojpeg0-dev libopencv-dev \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /app
COPY setup.cfg pyproject.toml constraints.txt README.md LICENSE ./
COPY vmoe_momentum vmoe_momentum
RUN python3 -m venv .venv \
    && .venv/bin/pip install --no-cache-dir -c constraints.txt \
        '.[attacks,autoattack,corruptions,export,ffcv,parquet,photos]' \
    && rm -rf vmoe_momentum build
COPY configs configs

ENV PATH=/app/.venv/bin:$PATH
ENTRYPOINT ["vmoe-momentum"]
CMD ["--help"]
