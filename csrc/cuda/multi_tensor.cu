#include "multi_tensor.h"

#include <cuda_runtime.h>

#include "../include/codes.h"
#include "../include/grid.h"
#include "../include/philox.h"
#include "../include/statistics.h"
#include "check.h"

namespace megatron_opt {
namespace {

// A thread's eight elements of one slot. `count` of them exist; 16-byte accesses where all do and the address allows.
struct Lane {
  int64_t at;
  int count;
};

template <class T>
__device__ __forceinline__ void read(T (&to)[kVector], const void* data, Lane lane) {
  const T* from = static_cast<const T*>(data) + lane.at;
  constexpr int kBytes = sizeof(T) * kVector < 16 ? sizeof(T) * kVector : 16;
  if (lane.count == kVector && reinterpret_cast<uintptr_t>(from) % kBytes == 0) {
    if constexpr (kBytes == 8) {
      *reinterpret_cast<uint2*>(to) = *reinterpret_cast<const uint2*>(from);
    } else {
#pragma unroll
      for (int i = 0; i < kVector * static_cast<int>(sizeof(T)) / 16; ++i) {
        reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(from)[i];
      }
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kVector; ++i) to[i] = i < lane.count ? from[i] : T(0);
}

template <class T>
__device__ __forceinline__ void write(const T (&from)[kVector], void* data, Lane lane) {
  T* to = static_cast<T*>(data) + lane.at;
  constexpr int kBytes = sizeof(T) * kVector < 16 ? sizeof(T) * kVector : 16;
  if (lane.count == kVector && reinterpret_cast<uintptr_t>(to) % kBytes == 0) {
    if constexpr (kBytes == 8) {
      *reinterpret_cast<uint2*>(to) = *reinterpret_cast<const uint2*>(from);
    } else {
#pragma unroll
      for (int i = 0; i < kVector * static_cast<int>(sizeof(T)) / 16; ++i) {
        reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(from)[i];
      }
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    if (i < lane.count) to[i] = from[i];
  }
}

__device__ void load(float (&x)[kVector], const TensorEntry& t, int slot, Lane lane) {
  const Format format = t.format[slot];
  if (format == Format::f32) {
    alignas(16) float raw[kVector];
    read(raw, t.data[slot], lane);
#pragma unroll
    for (int i = 0; i < kVector; ++i) x[i] = raw[i];
  } else if (format == Format::bf16) {
    alignas(16) uint16_t raw[kVector];
    read(raw, t.data[slot], lane);
#pragma unroll
    for (int i = 0; i < kVector; ++i) x[i] = bf16_to_float(raw[i]);
  } else {
    alignas(16) uint8_t raw[kVector];
    read(raw, t.data[slot], lane);
    const float absmax = lane.count > 0 ? t.absmax[slot][lane.at / kBlock] : 0.0f;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      x[i] = format == Format::signed8 ? decode_signed(raw[i], absmax) : decode_unsigned(raw[i], absmax);
    }
  }
}

__device__ void draw(uint32_t (&bits)[kVector], const Options& o, int slot, uint64_t first) {
  const uint32_t odd = static_cast<uint32_t>(first % 4);
  uint32_t drawn[kVector + 4];
#pragma unroll
  for (int k = 0; k < kVector / 4 + 1; ++k) {
    const Random4 r = philox(o.seed, o.step, static_cast<uint32_t>(slot), first / 4 + k);
    drawn[4 * k] = r.x;
    drawn[4 * k + 1] = r.y;
    drawn[4 * k + 2] = r.z;
    drawn[4 * k + 3] = r.w;
  }
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    bits[i] = odd == 0 ? drawn[i] : odd == 1 ? drawn[i + 1] : odd == 2 ? drawn[i + 2] : drawn[i + 3];
  }
}

// Absolute maximum over the thread block, NaN where any element is not finite; every thread must call it.
__device__ float block_absmax(const float (&x)[kVector], Lane lane) {
  __shared__ float warps[kThreads / 32];
  float largest = 0.0f;
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    if (i < lane.count) largest = is_finite(x[i]) ? fmaxf(largest, fabsf(x[i])) : INFINITY;
  }
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, offset));
  __syncthreads();
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = largest;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kThreads / 32; ++w) largest = fmaxf(largest, warps[w]);
  return is_finite(largest) ? largest : NAN;
}

__device__ void store(const float (&x)[kVector], const Options& o, const TensorEntry& t, int slot, Lane lane) {
  const Format format = t.format[slot];
  if (format == Format::f32) {
    alignas(16) float raw[kVector];
#pragma unroll
    for (int i = 0; i < kVector; ++i) raw[i] = x[i];
    write(raw, t.data[slot], lane);
    return;
  }
  const bool noisy = format == Format::unsigned8 || (o.stochastic && slot != kCopy);
  uint32_t bits[kVector];
  if (noisy) draw(bits, o, slot, t.first + static_cast<uint64_t>(lane.at));
  if (format == Format::bf16) {
    alignas(16) uint16_t raw[kVector];
#pragma unroll
    for (int i = 0; i < kVector; ++i) raw[i] = noisy ? float_to_bf16(x[i], bits[i] >> 16) : float_to_bf16(x[i]);
    write(raw, t.data[slot], lane);
    return;
  }
  const float absmax = block_absmax(x, lane);
  const float inverse = absmax > 0.0f ? 1.0f / absmax : 0.0f;
  if (threadIdx.x == 0) t.absmax[slot][lane.at / kBlock] = absmax;
  alignas(16) uint8_t raw[kVector];
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    if (format == Format::unsigned8) {
      raw[i] = encode_unsigned(x[i], inverse, bits[i] >> 12);
    } else {
      raw[i] = encode_signed(x[i], inverse, noisy ? static_cast<float>(bits[i] >> 8) * 0x1p-24f : 0.5f);
    }
  }
  write(raw, t.data[slot], lane);
}

// Three sums over the thread block in a fixed order; the first thread writes them.
__device__ void write_sums(double a, double b, double c, double* to) {
  __shared__ double warps[kThreads / 32][kSums];
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    a += __shfl_xor_sync(~0u, a, offset);
    b += __shfl_xor_sync(~0u, b, offset);
    c += __shfl_xor_sync(~0u, c, offset);
  }
  __syncthreads();
  if (threadIdx.x % 32 == 0) {
    warps[threadIdx.x / 32][0] = a;
    warps[threadIdx.x / 32][1] = b;
    warps[threadIdx.x / 32][2] = c;
  }
  __syncthreads();
  if (threadIdx.x < kSums) {
    double sum = 0.0;
#pragma unroll
    for (int w = 0; w < kThreads / 32; ++w) sum += warps[w][threadIdx.x];
    to[threadIdx.x] = sum;
  }
}

__device__ __forceinline__ Lane lane_of(const Batch& batch, int index, int64_t block) {
  const int64_t at = (block - batch.first[index]) * kBlock + threadIdx.x * kVector;
  const int64_t left = batch.entries[index].numel - at;
  return {at, static_cast<int>(left < 0 ? 0 : (left < kVector ? left : kVector))};
}

__device__ __forceinline__ Coefficients coefficients_of(const Options& o) {
  return o.device_coefficients != nullptr ? *reinterpret_cast<const Coefficients*>(o.device_coefficients)
                                          : o.coefficients;
}

template <class R>
__global__ void __launch_bounds__(kThreads) update_kernel(const __grid_constant__ Batch batch, double* partial) {
  const Options& o = batch.options;
  const Coefficients c = coefficients_of(o);
  const int64_t blocks = batch.first[batch.count];
  for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    const int index = locate(batch.first, batch.count, block);
    const TensorEntry& t = batch.entries[index];
    const Lane lane = lane_of(batch, index, block);
    const float scale = o.scales != nullptr ? o.scales[2 * (batch.base + index)] : 1.0f;
    const float factor = o.scales != nullptr ? o.scales[2 * (batch.base + index) + 1] : 1.0f;
    float g[kVector], s0[kVector] = {}, s1[kVector] = {}, s2[kVector] = {}, p[kVector] = {};
    load(g, t, kGrad, lane);
    if constexpr (R::kStates > 0) load(s0, t, kState0, lane);
    if constexpr (R::kStates > 1) load(s1, t, kState1, lane);
    if constexpr (R::kStates > 2) load(s2, t, kState2, lane);
    if constexpr (!R::kOutput) load(p, t, kParam, lane);
    double squares = 0.0, odd = 0.0, output_squares = 0.0;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (partial != nullptr && i < lane.count) {
        squares += static_cast<double>(g[i]) * g[i];
        odd += is_finite(g[i]) ? 0.0 : 1.0;
      }
      const float u = R::direction(g[i] * c.grad_scale, s0[i], s1[i], s2[i], scale, c);
      p[i] = R::kOutput ? u : descend(p[i], u, o.cautious_decay, c) * factor;
      if (R::kOutput && partial != nullptr && i < lane.count) output_squares += static_cast<double>(u) * u;
    }
    if constexpr (R::kWritten > 0) store(s0, o, t, kState0, lane);
    if constexpr (R::kWritten > 1) store(s1, o, t, kState1, lane);
    if constexpr (R::kWritten > 2) store(s2, o, t, kState2, lane);
    if constexpr (!R::kOutput) store(p, o, t, kParam, lane);
    if (t.format[kCopy] != Format::absent) store(p, o, t, kCopy, lane);
    if (partial != nullptr) {
      write_sums(squares, odd, output_squares, partial + kSums * (batch.base_block + block));
    }
  }
}

template <class S>
__global__ void __launch_bounds__(kThreads) sum_kernel(const __grid_constant__ Batch batch, double* partial) {
  const Coefficients k = coefficients_of(batch.options);
  const int64_t blocks = batch.first[batch.count];
  for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    const int index = locate(batch.first, batch.count, block);
    const TensorEntry& t = batch.entries[index];
    const Lane lane = lane_of(batch, index, block);
    float p[kVector] = {}, g[kVector], s[kVector] = {};
    if constexpr (S::kParam) load(p, t, kParam, lane);
    load(g, t, kGrad, lane);
    if constexpr (S::kState) load(s, t, kState0, lane);
    typename S::Number a = 0, b = 0, c = 0;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (i < lane.count) S::add(p[i], g[i] * k.grad_scale, s[i], k, a, b, c);
    }
    write_sums(a, b, c, partial + kSums * (batch.base_block + block));
  }
}

// Adds the blocks of each entry in a fixed order: one thread block a entry.
__global__ void __launch_bounds__(kThreads) add_kernel(const __grid_constant__ Batch batch, const double* partial,
                                                       double* sums) {
  for (int index = blockIdx.x; index < batch.count; index += gridDim.x) {
    double a = 0.0, b = 0.0, c = 0.0;
    for (int64_t block = batch.first[index] + threadIdx.x; block < batch.first[index + 1]; block += kThreads) {
      const double* from = partial + kSums * (batch.base_block + block);
      a += from[0];
      b += from[1];
      c += from[2];
    }
    write_sums(a, b, c, sums + kSums * (batch.base + index));
  }
}

using Kernel = void (*)(Batch, double*);

// Launches `kernel` over all entries; then, where sums are wanted, adds up what the blocks left in the workspace.
void launch(Kernel kernel, const Options& options, const std::vector<TensorEntry>& entries, double* workspace, double* sums,
            cudaStream_t stream) {
  int device = 0, multiprocessors = 0, resident = 0;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, kThreads, 0));
  const std::vector<int> starts = launches(entries.size());
  static thread_local Batch batch;
  int64_t base_block = 0;
  for (size_t i = 0; i + 1 < starts.size(); ++i) {
    const int64_t blocks = fill(batch, options, entries, starts[i], starts[i + 1], base_block);
    if (blocks > 0) {
      kernel<<<grid_size(blocks, multiprocessors, resident), kThreads, 0, stream>>>(batch, workspace);
      check(cudaGetLastError());
    }
    if (sums != nullptr) {
      add_kernel<<<grid_size(batch.count, multiprocessors, resident), kThreads, 0, stream>>>(batch, workspace, sums);
      check(cudaGetLastError());
    }
    base_block += blocks;
  }
}

}  // namespace

int64_t workspace_cuda(const std::vector<TensorEntry>& entries) { return kSums * total_blocks(entries); }

void update_cuda(UpdateKind kind, const Options& options, const std::vector<TensorEntry>& entries, double* workspace,
                 cudaStream_t stream) {
  static constexpr Kernel kernels[] = {update_kernel<Adam>,   update_kernel<Mars>,     update_kernel<Cautious>,
                                       update_kernel<Lion>,   update_kernel<Signum>,   update_kernel<Sophia>,
                                       update_kernel<Momentum>, update_kernel<Apply>};
  launch(kernels[static_cast<int>(kind)], options, entries, options.sums != nullptr ? workspace : nullptr, options.sums,
         stream);
}

void sum_cuda(Sum kind, const Options& options, const std::vector<TensorEntry>& entries, double* workspace, double* sums,
              cudaStream_t stream) {
  static constexpr Kernel kernels[] = {sum_kernel<GradientNorm>, sum_kernel<CautiousMask>, sum_kernel<MarsNorm>,
                                       sum_kernel<Products>};
  launch(kernels[static_cast<int>(kind)], options, entries, workspace, sums, stream);
}

}  // namespace megatron_opt
