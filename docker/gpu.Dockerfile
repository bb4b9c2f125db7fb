# GPU image: docker build -f docker/gpu.Dockerfile -t megatron-opt:gpu .
# NGC's image brings torch, CUDA, NCCL, Transformer Engine and Apex, built for each other: none of them is replaced.
# 26.09, the newest tag known in November 2026: torch 2.14.0a0, CUDA 13.4, cuDNN 9.26.0, NCCL 2.31.2, Transformer Engine
# 2.19.0, Python 3.12 (as users of the image report). Its Apex is not reported; `doctor` tells what is there.
ARG NGC_TAG=26.09-py3
FROM nvcr.io/nvidia/pytorch:${NGC_TAG}

ARG CUDA_ARCHITECTURES="8.0;9.0;10.0+PTX"
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
WORKDIR /opt/megatron_opt
COPY docker/requirements.txt docker/
# NGC's own list of constraints would refuse our pins: only what the base is built around is kept.
# The base is refused when its torch is not one that this package and megatron-core 0.19 are tested with.
RUN python -c "import torch; v = tuple(map(int, torch.__version__.split('.')[:2])); assert (2, 13) <= v < (2, 15), f'torch {torch.__version__}: choose another NGC_TAG'" \
 && pip list --format=freeze | grep -E '^(torch|numpy|transformer.engine|apex|nvidia|triton)' > /tmp/keep.txt \
 && PIP_CONSTRAINT=/tmp/keep.txt pip install -r docker/requirements.txt \
 && rm /tmp/keep.txt

COPY setup.py pyproject.toml MANIFEST.in README.md LICENSE ./
COPY csrc csrc
COPY megatron_opt megatron_opt
RUN MEGATRON_OPT_CUDA=1 TORCH_CUDA_ARCH_LIST="${CUDA_ARCHITECTURES}" \
    pip install --no-deps --no-build-isolation . \
 && rm -rf build csrc megatron_opt

COPY examples examples
RUN useradd --uid 10001 --create-home trainer
USER 10001
WORKDIR /home/trainer
# megatron-opt COMMAND; without one the image examines the machine it landed on
ENTRYPOINT ["megatron-opt"]
CMD ["doctor"]
