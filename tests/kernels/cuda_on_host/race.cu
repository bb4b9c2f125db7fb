#include "race.h"

#include <cuda_runtime.h>

namespace {

__global__ void reverse_kernel(float* x, int barriers) {
  __shared__ float held[64];
  held[threadIdx.x] = x[threadIdx.x];
  if (barriers != 1) __syncthreads();
  if (barriers == 3 && threadIdx.x < 32) __syncthreads();
  x[threadIdx.x] = held[63 - threadIdx.x];
}

}  // namespace

void reverse_cuda(float* x, int barriers) { reverse_kernel<<<1, 64>>>(x, barriers); }
