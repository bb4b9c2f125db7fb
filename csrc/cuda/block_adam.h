// Adam-mini on CUDA: plain pointers, so that the device code compiles without torch's headers.
#pragma once

#include <cuda_runtime_api.h>

#include <vector>

#include "../include/launch.h"

namespace megatron_opt {

// On `stream`, without synchronising or allocating.
void block_adam_cuda(const Coefficients& c, const std::vector<BlockEntry>& entries, cudaStream_t stream);

}  // namespace megatron_opt
