// The CPU kernels, included once for each instruction set. A block of 2048 elements is brought to fp32 in buffers that stay in
// the first-level cache (fp32 tensors are used in place), updated in one vectorised loop, and written back.
#include "../include/chunks.h"
#include "../include/codes.h"
#include "../include/philox.h"
#include "../include/statistics.h"
#include "kernels.h"

namespace megatron_opt {
inline namespace MOPT_ISA {

using Buffer = float[kBlock];

static void load(float* to, const TensorEntry& t, int slot, int64_t begin, int64_t n) {
  const Format format = t.format[slot];
  if (format == Format::bf16) {
    const uint16_t* from = static_cast<const uint16_t*>(t.data[slot]) + begin;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) to[i] = bf16_to_float(from[i]);
    return;
  }
  const uint8_t* from = static_cast<const uint8_t*>(t.data[slot]) + begin;
  const float absmax = t.absmax[slot][begin / kBlock];
  if (format == Format::signed8) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) to[i] = decode_signed(from[i], absmax);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) to[i] = decode_unsigned(from[i], absmax);
  }
}

// 32 random bits for each of n elements from number `first` on.
static const uint32_t* draw(uint32_t* bits, const Options& o, int slot, uint64_t first, int64_t n) {
  const uint64_t group = first / 4, groups = (first + static_cast<uint64_t>(n) + 3) / 4 - group;
#pragma omp simd
  for (uint64_t k = 0; k < groups; ++k) {
    const Random4 r = philox(o.seed, o.step, static_cast<uint32_t>(slot), group + k);
    bits[4 * k] = r.x;
    bits[4 * k + 1] = r.y;
    bits[4 * k + 2] = r.z;
    bits[4 * k + 3] = r.w;
  }
  return bits + first % 4;
}

static void store(const float* from, const Options& o, const TensorEntry& t, int slot, int64_t begin, int64_t n) {
  const Format format = t.format[slot];
  const bool noisy = format == Format::unsigned8 || (o.stochastic && slot != kCopy);
  alignas(64) uint32_t bits[kBlock + 8];
  const uint32_t* noise = noisy ? draw(bits, o, slot, t.first + static_cast<uint64_t>(begin), n) : nullptr;
  if (format == Format::bf16) {
    uint16_t* to = static_cast<uint16_t*>(t.data[slot]) + begin;
    if (noisy) {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) to[i] = float_to_bf16(from[i], noise[i] >> 16);
    } else {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) to[i] = float_to_bf16(from[i]);
    }
    return;
  }
  uint8_t* to = static_cast<uint8_t*>(t.data[slot]) + begin;
  float absmax = 0.0f;
  int odd = 0;
#pragma omp simd reduction(max : absmax) reduction(+ : odd)
  for (int64_t i = 0; i < n; ++i) {
    const float size = from[i] < 0.0f ? -from[i] : from[i];
    absmax = size > absmax ? size : absmax;
    odd += is_finite(from[i]) ? 0 : 1;
  }
  if (odd != 0) absmax = NAN;  // the block reads back as NaN: nothing is hidden
  t.absmax[slot][begin / kBlock] = absmax;
  const float inverse = absmax > 0.0f ? 1.0f / absmax : 0.0f;
  if (format == Format::unsigned8) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) to[i] = encode_unsigned(from[i], inverse, noise[i] >> 12);
  } else if (noisy) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) to[i] = encode_signed(from[i], inverse, static_cast<float>(noise[i] >> 8) * 0x1p-24f);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) to[i] = encode_signed(from[i], inverse, 0.5f);
  }
}

// A slot as fp32: the tensor itself, or the buffer filled from it.
static float* open(float* buffer, const TensorEntry& t, int slot, int64_t begin, int64_t n) {
  if (t.format[slot] == Format::f32) return static_cast<float*>(t.data[slot]) + begin;
  load(buffer, t, slot, begin, n);
  return buffer;
}

static void close(const float* from, const Options& o, const TensorEntry& t, int slot, int64_t begin, int64_t n) {
  if (t.format[slot] != Format::f32) store(from, o, t, slot, begin, n);
}

template <class R>
static void update_block(const Options& o, const TensorEntry& t, float scale, float factor, int64_t begin, int64_t n,
                         double* sums) {
  alignas(64) Buffer buffer[kSlots];
  const Coefficients c = o.coefficients;
  const float* g = open(buffer[kGrad], t, kGrad, begin, n);
  float* s0 = R::kStates > 0 ? open(buffer[kState0], t, kState0, begin, n) : nullptr;
  float* s1 = R::kStates > 1 ? open(buffer[kState1], t, kState1, begin, n) : nullptr;
  float* s2 = R::kStates > 2 ? open(buffer[kState2], t, kState2, begin, n) : nullptr;
  float* out;
  if (R::kOutput) {
    out = t.format[kCopy] == Format::f32 ? static_cast<float*>(t.data[kCopy]) + begin : buffer[kCopy];
  } else {
    out = open(buffer[kParam], t, kParam, begin, n);
  }
  if (sums != nullptr) {
    double squares = 0.0, odd = 0.0;
#pragma omp simd reduction(+ : squares, odd)
    for (int64_t i = 0; i < n; ++i) {
      squares += static_cast<double>(g[i]) * g[i];
      odd += is_finite(g[i]) ? 0.0 : 1.0;
    }
    sums[0] += squares;
    sums[1] += odd;
  }
  const bool cautious_decay = o.cautious_decay;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    float a = R::kStates > 0 ? s0[i] : 0.0f;
    float b = R::kStates > 1 ? s1[i] : 0.0f;
    float d = R::kStates > 2 ? s2[i] : 0.0f;
    const float u = R::direction(g[i] * c.grad_scale, a, b, d, scale, c);
    if (R::kWritten > 0) s0[i] = a;
    if (R::kWritten > 1) s1[i] = b;
    if (R::kWritten > 2) s2[i] = d;
    out[i] = R::kOutput ? u : descend(out[i], u, cautious_decay, c) * factor;
  }
  if (R::kWritten > 0) close(s0, o, t, kState0, begin, n);
  if (R::kWritten > 1) close(s1, o, t, kState1, begin, n);
  if (R::kWritten > 2) close(s2, o, t, kState2, begin, n);
  if (!R::kOutput) close(out, o, t, kParam, begin, n);
  if (t.format[kCopy] == Format::bf16) store(out, o, t, kCopy, begin, n);
  if (R::kOutput && sums != nullptr) {
    double squares = 0.0;
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < n; ++i) squares += static_cast<double>(out[i]) * out[i];
    sums[2] += squares;
  }
}

template <class S>
static void sum_block(const Options& o, const TensorEntry& t, int64_t begin, int64_t n, double* sums) {
  alignas(64) Buffer buffer[3];
  const Coefficients c = o.coefficients;
  const float* p = S::kParam ? open(buffer[0], t, kParam, begin, n) : nullptr;
  const float* g = open(buffer[1], t, kGrad, begin, n);
  const float* s = S::kState ? open(buffer[2], t, kState0, begin, n) : nullptr;
  typename S::Number a = 0, b = 0, d = 0;
#pragma omp simd reduction(+ : a, b, d)
  for (int64_t i = 0; i < n; ++i) {
    S::add(S::kParam ? p[i] : 0.0f, g[i] * c.grad_scale, S::kState ? s[i] : 0.0f, c, a, b, d);
  }
  sums[0] += a;
  sums[1] += b;
  sums[2] += d;
}

static void adam_block(const Coefficients& c, const float* g, float* m, float* v, float* u, int64_t n) {
  double squares = 0.0;
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < n; ++i) squares += static_cast<double>(g[i]) * g[i];
  const float scale = block_scale(squares, n, *v, c);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float moment = c.beta1 * m[i] + c.input_weight1 * g[i];
    m[i] = moment;
    u[i] = moment * scale;
  }
}

static Kernels kernels(const char* name) {
  return {name,
          {update_block<Adam>, update_block<Mars>, update_block<Cautious>, update_block<Lion>, update_block<Signum>,
           update_block<Sophia>, update_block<Momentum>, update_block<Apply>},
          {sum_block<GradientNorm>, sum_block<CautiousMask>, sum_block<MarsNorm>, sum_block<Products>},
          adam_block};
}

}  // namespace MOPT_ISA
}  // namespace megatron_opt
