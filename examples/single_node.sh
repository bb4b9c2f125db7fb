#!/usr/bin/env bash
# One node: `DATA=/data OUTPUT=/runs/a examples/single_node.sh 130m [more flags]`; --train-iters says how far.
# Starting it again resumes from the newest whole checkpoint.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
scale=${1:?130m, 1.2b or 7b}
shift
# shellcheck source=examples/layouts/130m.sh
source "$here/layouts/$scale.sh"
# shellcheck source=examples/run_flags.sh
source "$here/run_flags.sh"

exec megatron-opt train "${layout[@]}" "${run[@]}" "$@"
