# docker build -t um3 .                                                             for a CPU
# docker build -t um3 --build-arg TORCH_INDEX=https://pypi.org/simple .             for NVIDIA GPUs
# docker run --rm -v "$PWD/runs:/um3/runs" um3                                      make demo (GPUs: --gpus all)
FROM python:3.12-slim
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# g++: torch.compile
RUN apt-get update && apt-get install -y --no-install-recommends make g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /um3
ENV PIP_NO_CACHE_DIR=1
COPY . .
# make setup keeps the torch that is there.
RUN python -m venv .venv \
    && .venv/bin/pip install --index-url "$TORCH_INDEX" -c constraints.txt torch \
    && make setup
CMD ["make", "demo"]
