# shellcheck shell=bash disable=SC2034
# The 130m Llama of the study on one node of 8 GPUs: data-parallel only.
# A copy of model, gradients and optimizer needs 1.2 GB, so nothing is gained by cutting it; 8 sequences at once fill the
# GPU and leave 2 micro-batches a step. 36 GB of an H100's 80 (`megatron-opt cost step --cluster h100 --gpus 8` and these
# flags); on GPUs of 24 GB give --micro-batch-size 4.
nodes=1
lr=8e-3 # of muon: the best of 9 of the 12 published runs of 130m to 520m (arXiv 2509.02046)
layout=(
  --preset llama-130m --bf16
  --micro-batch-size 8
  --use-distributed-optimizer --overlap-grad-reduce
)
