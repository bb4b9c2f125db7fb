// Multi-tensor calls on CPU: one parallel loop over the blocks of all tensors.
#pragma once

#include <vector>

#include "../include/launch.h"

namespace megatron_opt {

void update_cpu(UpdateKind kind, const Options& options, const std::vector<TensorEntry>& entries, int threads);

// Three sums a entry into `sums`.
void sum_cpu(Sum kind, const Options& options, const std::vector<TensorEntry>& entries, double* sums, int threads);

// Adam-mini: m ← EMA(g), v ← EMA(mean g² of a block), u = m̂/(√v̂ + ε).
void block_adam_cpu(const Coefficients& c, const std::vector<BlockEntry>& entries, int threads);

// "portable", "avx2" or "avx512": what this processor runs.
const char* cpu_kernels_name();

}  // namespace megatron_opt
