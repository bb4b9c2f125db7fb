// 8-bit state codes: a block of 2048 values shares one absolute maximum.
#pragma once

#include <cmath>

#include "platform.h"

namespace megatron_opt {
inline namespace MOPT_ISA {

// Signed values (first moments): linear, 127 steps either side of zero. `shift` in [0, 1) before flooring: 0.5 rounds to
// nearest, a uniform draw rounds stochastically.
MOPT_HD uint8_t encode_signed(float x, float inverse_absmax, float shift) {
  const float code = floorf(x * inverse_absmax * 127.0f + shift);
  const float bounded = code > -127.0f ? (code < 127.0f ? code : 127.0f) : -127.0f;  // also for NaN
  return static_cast<uint8_t>(static_cast<int8_t>(bounded));
}

MOPT_HD float decode_signed(uint8_t code, float absmax) {
  return static_cast<float>(static_cast<int8_t>(code)) * (absmax * (1.0f / 127.0f));
}

// Non-negative values (second moments): 5 exponent and 3 mantissa bits of x/absmax, 31 octaves; only 0 has the code 0, as a
// second moment that vanished would make the update explode. `noise` is 20 random bits: an average decays by less than
// a code a step, so that rounding to nearest would freeze it.
constexpr int kUnsignedBias = (127 - 31) << 3;

MOPT_HD uint8_t encode_unsigned(float x, float inverse_absmax, uint32_t noise) {
  const float ratio = x * inverse_absmax;
  const int code = static_cast<int>((to_bits(ratio < 1.0f ? ratio : 1.0f) + noise) >> 20) - kUnsignedBias;
  const int raised = code < 1 ? 1 : (code > 248 ? 248 : code);
  return static_cast<uint8_t>(x > 0.0f ? raised : 0);
}

MOPT_HD float decode_unsigned(uint8_t code, float absmax) {
  return code == 0 ? 0.0f : from_bits((static_cast<uint32_t>(code) + kUnsignedBias) << 20) * absmax;
}

}  // namespace MOPT_ISA
}  // namespace megatron_opt
