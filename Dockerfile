# yarn_tune on NVIDIA GPUs. Never built by the tests, which have neither Docker nor a GPU.
#
#   docker build -t yarn_tune .
#   docker run --gpus all --ipc=host -v "$PWD":/work yarn_tune run recipes/tiny-demo.yaml
#   docker run --gpus all --ipc=host -v "$PWD":/work --entrypoint accelerate yarn_tune \
#     launch --config_file /opt/yarn_tune/recipes/accelerate/gpus.yaml --num_processes 8 -m yarn_tune run RECIPE
#
# The base has a compiler and nvcc, which torch.compile and DeepSpeed's kernels need. Its CUDA should be that of the torch
# in constraints.txt, or older.
ARG BASE=nvidia/cuda:12.8.1-devel-ubuntu24.04
FROM ${BASE}
RUN apt-get update \
    && apt-get install -y --no-install-recommends git python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
ENV VIRTUAL_ENV=/opt/venv PATH=/opt/venv/bin:$PATH
COPY . /opt/yarn_tune
RUN python3 -m venv /opt/venv \
    && pip install --no-cache-dir --constraint /opt/yarn_tune/constraints.txt "/opt/yarn_tune[trackers]"
WORKDIR /work
ENTRYPOINT ["yarn-tune"]
CMD ["--help"]
