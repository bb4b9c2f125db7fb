#!/bin/sh
# Runs the CPU kernels under the address and undefined-behaviour sanitizers, once for each instruction set of this processor.
set -eu
cd "$(dirname "$0")/.."
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
flags="-std=c++20 -O1 -g -fopenmp -fno-math-errno -fno-trapping-math -fno-omit-frame-pointer
  -fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all"
# shellcheck disable=SC2016,SC2086  # flags are words; the inner shell expands
printf '%s\n' csrc/cpu/*.cpp tests/kernels/sanitize_driver.cpp |
  xargs -P "$(nproc)" -I{} sh -c 'build=$1; shift; "$@" -c "$0" -o "$build/$(basename "$0" .cpp).o"' {} "$build" "${CXX:-c++}" $flags
# shellcheck disable=SC2086
"${CXX:-c++}" $flags "$build"/*.o -o "$build/driver"
for isa in portable avx2 avx512; do
  MEGATRON_OPT_ISA=$isa "$build/driver"
done
