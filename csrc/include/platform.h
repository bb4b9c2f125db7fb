// What every kernel file shares: the host/device marker, the number formats and their conversions.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define MOPT_HD __host__ __device__ __forceinline__
#else
#define MOPT_HD inline __attribute__((always_inline))
#endif

// Each instruction-set build of the CPU kernels has its own namespace, so that the linker never merges them.
#ifndef MOPT_ISA
#define MOPT_ISA portable
#endif

namespace megatron_opt {
inline namespace MOPT_ISA {

MOPT_HD float from_bits(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
#endif
}

MOPT_HD uint32_t to_bits(float value) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(value);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
#endif
}

MOPT_HD bool is_finite(float value) { return (to_bits(value) & 0x7f800000u) != 0x7f800000u; }

MOPT_HD float bf16_to_float(uint16_t value) { return from_bits(static_cast<uint32_t>(value) << 16); }

// Adds `noise` below the kept bits and truncates; Inf and NaN stay what they are.
MOPT_HD uint16_t float_to_bf16(float value, uint32_t noise) {
  const uint32_t bits = to_bits(value);
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  const uint32_t rounded = (bits + noise) >> 16;
  const uint32_t special = (bits >> 16) | ((bits & 0xffffu) != 0u ? 0x40u : 0u);
  return static_cast<uint16_t>(finite ? rounded : special);
}

// Round to nearest, ties to even.
MOPT_HD uint16_t float_to_bf16(float value) {
  return float_to_bf16(value, 0x7fffu + ((to_bits(value) >> 16) & 1u));
}

}  // namespace MOPT_ISA
}  // namespace megatron_opt
