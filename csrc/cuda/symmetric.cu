#include "symmetric.h"

#include <cuda_bf16.h>
#include <cuda_pipeline_primitives.h>
#include <cuda_runtime.h>
#include <mma.h>

#include "../include/triangle.h"
#include "check.h"

namespace megatron_opt {
namespace {

using Half = __nv_bfloat16;
namespace wmma = nvcuda::wmma;

constexpr int kThreadsOfTile = 256;  // eight warps, each of them 64 rows × 32 columns
constexpr int kDepth = 32;           // elements of k a stage holds
constexpr int kStages = 3;
constexpr int kPitch = kDepth + 8;     // rows of a stage are 80 bytes apart: no bank conflicts, 16-byte aligned
constexpr int kOutPitch = kTile + 4;
constexpr int kStageElements = 2 * kTile * kPitch;
constexpr size_t kShared = kStages * kStageElements * sizeof(Half) > kTile * kOutPitch * sizeof(float)
                               ? kStages * kStageElements * sizeof(Half)
                               : kTile * kOutPitch * sizeof(float);

// 128 rows × 32 elements from (row, at) into a stage; what lies outside a is zero. `vectors`: rows allow 16-byte copies.
__device__ __forceinline__ void fetch(Half* to, const Half* a, int64_t n, int64_t k, int64_t row, int64_t at, bool vectors) {
  constexpr int kVectors = kDepth / 8;
#pragma unroll
  for (int i = threadIdx.x; i < kTile * kVectors; i += kThreadsOfTile) {
    const int r = i / kVectors, c = i % kVectors * 8;
    Half* place = to + r * kPitch + c;
    const bool inside = row + r < n && at + c < k;
    if (vectors) {
      const Half* from = a + (inside ? (row + r) * k + at + c : 0);
      __pipeline_memcpy_async(place, from, 16, inside ? 0 : 16);
    } else {
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        place[e] = inside && at + c + e < k ? a[(row + r) * k + at + c + e] : __float2bfloat16(0.0f);
      }
    }
  }
}

__global__ void __launch_bounds__(kThreadsOfTile) symmetric_kernel(const SymmetricProduct p) {
  extern __shared__ __align__(128) unsigned char memory[];
  Half* stages = reinterpret_cast<Half*>(memory);
  const Half* a = static_cast<const Half*>(p.a) + static_cast<int64_t>(blockIdx.y) * p.n * p.k;
  const TilePlace tile = triangle_tile(blockIdx.x);
  const int64_t row = static_cast<int64_t>(tile.row) * kTile, column = static_cast<int64_t>(tile.column) * kTile;
  const int warp = threadIdx.x / 32, warp_row = warp / 4 * 64, warp_column = warp % 4 * 32;
  const bool vectors = p.k % 8 == 0 && reinterpret_cast<uintptr_t>(p.a) % 16 == 0;
  wmma::fragment<wmma::accumulator, 16, 16, 16, float> sum[4][2];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 2; ++j) wmma::fill_fragment(sum[i][j], 0.0f);
  }
  const int64_t steps = (p.k + kDepth - 1) / kDepth;
  const auto fetch_step = [&](int64_t step) {
    if (step < steps) {
      Half* stage = stages + step % kStages * kStageElements;
      fetch(stage, a, p.n, p.k, row, step * kDepth, vectors);
      fetch(stage + kTile * kPitch, a, p.n, p.k, column, step * kDepth, vectors);
    }
    __pipeline_commit();
  };
#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) fetch_step(step);
  for (int64_t step = 0; step < steps; ++step) {
    __pipeline_wait_prior(kStages - 2);
    __syncthreads();  // this stage is here, and all are done with the one that is fetched next
    fetch_step(step + kStages - 1);
    const Half* left = stages + step % kStages * kStageElements + warp_row * kPitch;
    const Half* right = stages + step % kStages * kStageElements + (kTile + warp_column) * kPitch;
#pragma unroll
    for (int at = 0; at < kDepth; at += 16) {
      wmma::fragment<wmma::matrix_a, 16, 16, 16, Half, wmma::row_major> x[4];
      wmma::fragment<wmma::matrix_b, 16, 16, 16, Half, wmma::col_major> y[2];
#pragma unroll
      for (int i = 0; i < 4; ++i) wmma::load_matrix_sync(x[i], left + i * 16 * kPitch + at, kPitch);
#pragma unroll
      for (int j = 0; j < 2; ++j) wmma::load_matrix_sync(y[j], right + j * 16 * kPitch + at, kPitch);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 2; ++j) wmma::mma_sync(sum[i][j], x[i], y[j], sum[i][j]);
      }
    }
  }
  __pipeline_wait_prior(0);
  __syncthreads();
  float* result = reinterpret_cast<float*>(memory);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      wmma::store_matrix_sync(result + (warp_row + 16 * i) * kOutPitch + warp_column + 16 * j, sum[i][j], kOutPitch,
                              wmma::mem_row_major);
    }
  }
  __syncthreads();
  const int64_t square = static_cast<int64_t>(blockIdx.y) * p.n * p.n;
  const Half* d = p.d != nullptr ? static_cast<const Half*>(p.d) + square : nullptr;
  Half* out = static_cast<Half*>(p.out) + square;
  for (int i = threadIdx.x; i < kTile * kTile; i += kThreadsOfTile) {
    const int64_t r = row + i / kTile, c = column + i % kTile;
    if (r >= p.n || c >= p.n) continue;
    float* value = result + i / kTile * kOutPitch + i % kTile;
    *value *= p.alpha;
    if (d != nullptr) *value += p.beta * __bfloat162float(d[r * p.n + c]);
    out[r * p.n + c] = __float2bfloat16(*value);
  }
  if (tile.row == tile.column) return;
  __syncthreads();
  for (int i = threadIdx.x; i < kTile * kTile; i += kThreadsOfTile) {  // mirrored: consecutive threads along a row of out again
    const int64_t r = column + i / kTile, c = row + i % kTile;
    if (r < p.n && c < p.n) out[r * p.n + c] = __float2bfloat16(result[i % kTile * kOutPitch + i / kTile]);
  }
}

}  // namespace

void symmetric_cuda(const SymmetricProduct& p, int64_t batch, cudaStream_t stream) {
  check(cudaFuncSetAttribute(symmetric_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(kShared)));
  constexpr int64_t kMost = 65535;  // of a grid's second extent
  const unsigned tiles = static_cast<unsigned>(triangle_tiles(p.n));
  for (int64_t begin = 0; begin < batch && tiles > 0; begin += kMost) {
    SymmetricProduct part = p;
    part.a = static_cast<const Half*>(p.a) + begin * p.n * p.k;
    part.d = p.d == nullptr ? nullptr : static_cast<const Half*>(p.d) + begin * p.n * p.n;
    part.out = static_cast<Half*>(p.out) + begin * p.n * p.n;
    const unsigned rows = static_cast<unsigned>(batch - begin < kMost ? batch - begin : kMost);
    symmetric_kernel<<<dim3(tiles, rows), kThreadsOfTile, kShared, stream>>>(part);
    check(cudaGetLastError());
  }
}

}  // namespace megatron_opt
