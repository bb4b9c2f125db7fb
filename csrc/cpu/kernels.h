// Entry points of one instruction-set build of the CPU kernels; multi_tensor.cpp picks the build for this processor.
#pragma once

#include "../include/launch.h"

namespace megatron_opt {

// Elements begin … begin+count (count <= kBlock, begin a multiple of it) of one entry; `sums` has three entries or is null.
using UpdateBlock = void (*)(const Options&, const TensorEntry&, float scale, float factor, int64_t begin, int64_t count,
                             double* sums);
using SumBlock = void (*)(const Options&, const TensorEntry&, int64_t begin, int64_t count, double* sums);

// One block of Adam-mini: `count` elements that share v.
using AdamBlock = void (*)(const Coefficients&, const float* g, float* m, float* v, float* u, int64_t count);

struct Kernels {
  const char* name;
  UpdateBlock update[8];  // by UpdateKind
  SumBlock sum[4];        // by Sum
  AdamBlock block_adam;
};

Kernels portable_kernels();
Kernels avx2_kernels();
Kernels avx512_kernels();

}  // namespace megatron_opt
