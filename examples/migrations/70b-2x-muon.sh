#!/usr/bin/env bash
# Llama 70B, 2x Chinchilla (2.7T tokens), from AdamW to Muon on 1,024 H200; the run is given by a file of flags.
set -euo pipefail
cd "$(dirname "$0")"
megatron-opt migrate plan --from llama-70b.yaml --to muon --cluster h200 --gpus 1024 --chinchilla 2 \
  --output 70b-2x-muon
