// Multi-tensor calls on CUDA: plain pointers, so that the device code compiles without torch's headers.
#pragma once

#include <cuda_runtime_api.h>

#include <vector>

#include "../include/launch.h"

namespace megatron_opt {

// Doubles of workspace that sums over these entries need.
int64_t workspace_cuda(const std::vector<TensorEntry>& entries);

// On `stream`, without synchronising or allocating; `workspace` may be null where options.sums is.
void update_cuda(UpdateKind kind, const Options& options, const std::vector<TensorEntry>& entries, double* workspace,
                 cudaStream_t stream);

// Three sums a entry into `sums` (device memory).
void sum_cuda(Sum kind, const Options& options, const std::vector<TensorEntry>& entries, double* workspace, double* sums,
              cudaStream_t stream);

}  // namespace megatron_opt
