#!/usr/bin/env bash
# Several nodes without a scheduler: the same command on each, HEAD naming one of them.
#   DATA=… OUTPUT=/shared/a HEAD=node1:29500 examples/multi_node.sh 1.2b --train-iters 10000
# A node that dies is waited for (or, with NODES=2:4, done without) and all ranks resume from the newest checkpoint.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
scale=${1:?130m, 1.2b or 7b}
shift
: "${HEAD:?HOST:PORT of one of the nodes}"
# shellcheck source=examples/layouts/1.2b.sh
source "$here/layouts/$scale.sh"
# shellcheck source=examples/run_flags.sh
source "$here/run_flags.sh"

exec megatron-opt train --nnodes "${NODES:-$nodes}" ${RANKS:+--nproc-per-node "$RANKS"} \
  --rdzv-endpoint "$HEAD" --rdzv-id "${RUN_ID:-$(basename "$OUTPUT")}" \
  --max-restarts "${RESTARTS:-10}" "${layout[@]}" "${run[@]}" "$@"
