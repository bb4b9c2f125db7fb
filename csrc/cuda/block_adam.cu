#include "block_adam.h"

#include <cuda_runtime.h>

#include "../include/block_grid.h"
#include "../include/updates.h"
#include "check.h"

namespace megatron_opt {
namespace {

// Sum over the thread block in a fixed order; every thread gets it.
__device__ double block_sum(double x) {
  __shared__ double warps[kThreads / 32];
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
  __syncthreads();
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
  __syncthreads();
  double sum = 0.0;
#pragma unroll
  for (int w = 0; w < kThreads / 32; ++w) sum += warps[w];
  return sum;
}

__device__ __forceinline__ bool aligned16(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// A thread block takes whole blocks of elements: first the mean of g², then both moments and the direction.
__global__ void __launch_bounds__(kThreads) block_adam_kernel(const __grid_constant__ BlockBatch batch) {
  const Coefficients c = batch.coefficients;
  const int64_t blocks = batch.first[batch.count];
  for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    const int index = locate(batch.first, batch.count, block);
    const BlockEntry& t = batch.entries[index];
    const int64_t size = t.numel / t.blocks, number = block - batch.first[index], start = number * size;
    const float* g = t.g + start;
    float *m = t.m + start, *u = t.u + start;
    const bool vectors = size % 4 == 0 && aligned16(g) && aligned16(m) && aligned16(u);
    double squares = 0.0;
    if (vectors) {
      for (int64_t i = threadIdx.x; i < size / 4; i += kThreads) {
        const float4 x = reinterpret_cast<const float4*>(g)[i];
        squares += static_cast<double>(x.x) * x.x + static_cast<double>(x.y) * x.y + static_cast<double>(x.z) * x.z +
                   static_cast<double>(x.w) * x.w;
      }
    } else {
      for (int64_t i = threadIdx.x; i < size; i += kThreads) squares += static_cast<double>(g[i]) * g[i];
    }
    squares = block_sum(squares);
    float v = t.v[number];
    const float scale = block_scale(squares, size, v, c);
    __syncthreads();  // all have read v
    if (threadIdx.x == 0) t.v[number] = v;
    if (vectors) {
      for (int64_t i = threadIdx.x; i < size / 4; i += kThreads) {
        const float4 x = reinterpret_cast<const float4*>(g)[i];
        float4 moment = reinterpret_cast<const float4*>(m)[i];
        moment.x = c.beta1 * moment.x + c.input_weight1 * x.x;
        moment.y = c.beta1 * moment.y + c.input_weight1 * x.y;
        moment.z = c.beta1 * moment.z + c.input_weight1 * x.z;
        moment.w = c.beta1 * moment.w + c.input_weight1 * x.w;
        reinterpret_cast<float4*>(m)[i] = moment;
        reinterpret_cast<float4*>(u)[i] = {moment.x * scale, moment.y * scale, moment.z * scale, moment.w * scale};
      }
    } else {
      for (int64_t i = threadIdx.x; i < size; i += kThreads) {
        const float moment = c.beta1 * m[i] + c.input_weight1 * g[i];
        m[i] = moment;
        u[i] = moment * scale;
      }
    }
  }
}

}  // namespace

void block_adam_cuda(const Coefficients& c, const std::vector<BlockEntry>& entries, cudaStream_t stream) {
  int device = 0, multiprocessors = 0, resident = 0;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, block_adam_kernel, kThreads, 0));
  static thread_local BlockBatch batch;
  for (size_t begin = 0; begin < entries.size(); begin += kBlockEntriesPerLaunch) {
    const size_t end = std::min(entries.size(), begin + kBlockEntriesPerLaunch);
    const int64_t blocks = fill(batch, c, entries, begin, end);
    if (blocks == 0) continue;
    block_adam_kernel<<<grid_size(blocks, multiprocessors, resident), kThreads, 0, stream>>>(batch);
    check(cudaGetLastError());
  }
}

}  // namespace megatron_opt
