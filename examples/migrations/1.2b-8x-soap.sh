#!/usr/bin/env bash
# Llama 1.2B, 8x Chinchilla (193B tokens), from AdamW to SOAP on 32 H100.
set -euo pipefail
cd "$(dirname "$0")"
megatron-opt migrate plan --to soap --cluster h100 --gpus 32 --chinchilla 8 --output 1.2b-8x-soap \
  --preset llama-1.2b --bf16 --global-batch-size 256 --lr 2e-3 \
  --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
