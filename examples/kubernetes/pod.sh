#!/usr/bin/env bash
# What a pod of pytorchjob.yaml runs; nodes, ranks and rendezvous come from the operator's PET_* variables.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
scale=${1:?130m, 1.2b or 7b}
shift
# shellcheck source=examples/layouts/1.2b.sh
source "$here/layouts/$scale.sh"
# shellcheck source=examples/run_flags.sh
source "$here/run_flags.sh"

exec megatron-opt train --shutdown-timeout 270 "${layout[@]}" "${run[@]}" "$@"
