// What one call hands to a kernel: plain data, the same for CPU and CUDA.
#pragma once

#include <cstdint>

namespace megatron_opt {

// Everything about a step that does not depend on the element; the same order as `Coefficients` in
// megatron_opt/kernels/multi_tensor.py.
struct Coefficients {
  float lr;          // learning rate
  float decay_factor;      // weight decay of this step (lr·wd when decoupled)
  float grad_scale;  // multiplies the gradient: clipping, loss scale
  float beta1;       // kept share of the first state
  float input_weight1;       // share of g that enters it (1 − β1; 1 for a momentum that is a sum)
  float beta2;
  float input_weight2;
  float eps;
  float momentum_weight;   // u's numerator is momentum_weight·m + gradient_weight·g: bias correction and Nesterov's form live here
  float gradient_weight;
  float inv_sqrt_correction2;   // 1/√(1 − β2^t)
  float gamma;    // Mars: γβ1/(1 − β1); Sophia: γ
};
constexpr int kCoefficients = sizeof(Coefficients) / sizeof(float);

enum class UpdateKind : int { adam, mars, cautious, lion, signum, sophia, momentum, apply };
enum class Sum : int { gradient_norm, cautious_mask, mars_norm, products };
enum class Format : uint8_t { absent, f32, bf16, signed8, unsigned8 };

// Tensor slots. `copy` is the bf16 copy of the parameter, or the output of an optimizer that has one.
enum Slot : int { kParam, kGrad, kState0, kState1, kState2, kCopy, kSlots };

struct TensorEntry {  // one tensor of the list, every slot of it
  int64_t numel;
  void* data[kSlots];
  float* absmax[kSlots];  // block scales of 8-bit states
  Format format[kSlots];
  uint64_t first;  // number of the first element, for stochastic rounding
};

struct BlockEntry {  // one tensor of Adam-mini, fp32: `blocks` equal runs of elements, each with one second moment
  const float* g;
  float* m;
  float* v;  // (blocks,)
  float* u;  // the direction
  int64_t numel, blocks;
};

struct Options {
  Coefficients coefficients;
  const float* device_coefficients;  // read instead of `coefficients` where given (CUDA graphs)
  const float* scales;               // (n, 2) per tensor: scale of the rule, factor on the new parameter; or null
  bool cautious_decay;
  bool stochastic;
  uint64_t seed;
  uint32_t step;
  double* sums;  // (n, 3) Σg², non-finite count, Σu²; or null
};

}  // namespace megatron_opt
