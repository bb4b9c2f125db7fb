// Philox4x32-10 (Salmon et al., SC 2011): random bits as a function of (seed, step, element), in any order.
#pragma once

#include "platform.h"

namespace megatron_opt {
inline namespace MOPT_ISA {

struct Random4 {
  uint32_t x, y, z, w;
};

// Bits for elements 4·group … 4·group+3 of `slot` at `step`.
MOPT_HD Random4 philox(uint64_t seed, uint32_t step, uint32_t slot, uint64_t group) {
  uint32_t c0 = static_cast<uint32_t>(group), c1 = static_cast<uint32_t>(group >> 32), c2 = step, c3 = slot;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = static_cast<uint64_t>(0xD2511F53u) * c0;
    const uint64_t b = static_cast<uint64_t>(0xCD9E8D57u) * c2;
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(b);
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(a);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {c0, c1, c2, c3};
}

}  // namespace MOPT_ISA
}  // namespace megatron_opt
