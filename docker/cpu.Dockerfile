# CPU image, for tests and small runs: docker build -f docker/cpu.Dockerfile -t megatron-opt:cpu .
FROM python:3.12.11-slim-bookworm AS build

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN apt-get update \
 && apt-get install --yes --no-install-recommends g++=4:12.2.0-3 \
 && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
# torch from its CPU index: PyPI's brings 5 GB of CUDA
RUN pip install --index-url https://download.pytorch.org/whl/cpu torch==2.14.1 \
 && pip install numpy==2.5.5 setuptools==84.2.1 wheel==0.48.0 pybind11==3.1.0 ninja==1.13.2

WORKDIR /src
COPY docker/requirements.txt docker/
RUN pip install -r docker/requirements.txt
COPY setup.py pyproject.toml MANIFEST.in README.md LICENSE ./
COPY csrc csrc
COPY megatron_opt megatron_opt
RUN pip install --no-deps --no-build-isolation .

FROM python:3.12.11-slim-bookworm
RUN apt-get update \
 && apt-get install --yes --no-install-recommends libgomp1=12.2.0-14+deb12u1 \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --uid 10001 --create-home trainer
COPY --from=build /opt/venv /opt/venv
COPY examples /opt/megatron_opt/examples
ENV PATH=/opt/venv/bin:$PATH
USER 10001
WORKDIR /home/trainer
ENTRYPOINT ["megatron-opt"]
CMD ["doctor"]
