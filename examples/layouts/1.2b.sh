# shellcheck shell=bash disable=SC2034
# The 1.2b Llama of the study on 4 nodes of 8 GPUs: data-parallel over all 32.
# Weights, gradients and state are 14 GB uncut, less than activations: tensor or pipeline parallelism would only add traffic.
# The distributed optimizer cuts main copies and state 32 ways and hides its gathers behind the forward pass; 4 sequences
# at once make one micro-batch a step. 49 GB of an H100's 80.
nodes=4
lr=8e-3 # of muon: the best of 9 of the 12 published runs of 130m to 520m (arXiv 2509.02046)
layout=(
  --preset llama-1.2b --bf16
  --micro-batch-size 4
  --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
)
