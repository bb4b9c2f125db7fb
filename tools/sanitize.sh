#!/bin/sh
# Runs the CPU kernels under the address and undefined-behaviour sanitizers, once for each instruction set of this processor.
set -eu
cd "$(dirname "$0")/.."
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
flags="-std=c++20 -O1 -g -fopenmp -fno-math-errno -fno-trapping-math -fno-omit-frame-pointer
  -fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all"
# shellcheck disable=SC2086 # flags are words
for source in csrc/cpu/*.cpp tests/kernels/sanitize_driver.cpp; do
  ${CXX:-c++} $flags -c "$source" -o "$build/$(basename "$source" .cpp).o"
done
# shellcheck disable=SC2086
${CXX:-c++} $flags "$build"/*.o -o "$build/driver"
for isa in portable avx2 avx512; do
  MEGATRON_OPT_ISA=$isa "$build/driver"
done
