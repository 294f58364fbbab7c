# mmod with the compiled kernels, for machines with an NVIDIA GPU:
#   make wheel && docker build --tag mmod-convert .
#   docker run --gpus all --volume "$PWD:/work" --volume "$HOME/.cache/huggingface:/hub" mmod-convert convert ORG/MODEL
# The kernels are built against the torch and CUDA of the image, so all four versions go together.
ARG IMAGE=pytorch/pytorch:2.11.0-cuda13.0-cudnn9

FROM ${IMAGE}-devel AS kernels
ARG TORCH_CUDA_ARCH_LIST="8.0;9.0"
RUN pip wheel --no-deps --no-build-isolation --wheel-dir /wheels mamba-ssm==2.3.2.post1 causal-conv1d==1.7.0

FROM ${IMAGE}-runtime
# Triton compiles its kernels with the C compiler when they first run.
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
COPY --from=kernels /wheels /wheels
COPY constraints.txt dist/*.whl /wheels/
# torch stays as the image has it.
RUN grep -v '^torch==' /wheels/constraints.txt > /wheels/others.txt \
    && pip install --no-cache-dir --constraint /wheels/others.txt /wheels/*.whl \
    && rm -rf /wheels
ENV HF_HOME=/hub
WORKDIR /work
ENTRYPOINT ["mmod"]
