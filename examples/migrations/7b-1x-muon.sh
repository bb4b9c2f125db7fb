#!/usr/bin/env bash
# Llama 7B, 1x Chinchilla (130B tokens), from AdamW to Muon on 64 H100.
set -euo pipefail
cd "$(dirname "$0")"
megatron-opt migrate plan --to muon --cluster h100 --gpus 64 --chinchilla 1 --output 7b-1x-muon \
  --preset llama-7b --tensor-model-parallel-size 2 --sequence-parallel \
  --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
