# shellcheck shell=bash disable=SC2034
# Llama 2's 7B on 8 to 64 nodes of 8 GPUs: tensor-parallel over 2 GPUs of a node, data-parallel over the rest.
# Uncut, 6.7 billion parameters with bf16 gradients in fp32 need 81 GB: they do not fit. TP 2 stays on NVLink and costs
# 7% of a step; PP 2 is as fast on 8 nodes but slower on 64, where 4 micro-batches are too few to fill the pipeline; TP 4 is
# slower by a fifth. Sequence parallelism cuts what TP leaves whole. 43 GB of an H100's 80 on 8 nodes, 42 on 64.
# The global batch of 1024 sequences divides evenly for 8, 16, 32 and 64 nodes (also with --nnodes MIN:MAX: other counts are
# refused at start).
nodes=${NODES:-8}
layout=(
  --preset llama-7b
  --tensor-model-parallel-size 2 --sequence-parallel
  --micro-batch-size 2
  --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
)
