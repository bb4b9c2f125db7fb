// Symmetric products on CUDA at half the FLOPs: plain pointers, so that the device code compiles without torch's headers.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace megatron_opt {

// out = alpha·a·aᵀ + beta·d: a (n, k), d symmetric (n, n) or null, out (n, n), all bf16 and row-major; batches follow each other.
struct SymmetricProduct {
  const void* a;
  const void* d;
  void* out;
  int64_t n, k;
  float alpha, beta;
};

// On `stream`, without synchronising or allocating.
void symmetric_cuda(const SymmetricProduct& p, int64_t batch, cudaStream_t stream);

}  // namespace megatron_opt
