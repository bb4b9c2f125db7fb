// The per-element rules, written once for CPU and CUDA. Each takes a gradient g, changes its states and returns the
// direction u; `descend` then does p ← p − lr·u − decay_factor·p. Everything that depends on the step alone is in Coefficients.
#pragma once

#include <cmath>

#include "launch.h"
#include "platform.h"

namespace megatron_opt {
inline namespace MOPT_ISA {

// NaN stays NaN, as in torch.sign.
MOPT_HD float sign(float x) { return x > 0.0f ? 1.0f : (x < 0.0f ? -1.0f : x); }

MOPT_HD bool agree(float a, float b) { return (a > 0.0f && b > 0.0f) || (a < 0.0f && b < 0.0f); }

MOPT_HD float adam(float g, float& m, float& v, const Coefficients& c) {
  m = c.beta1 * m + c.input_weight1 * g;
  v = c.beta2 * v + c.input_weight2 * g * g;
  return (c.momentum_weight * m + c.gradient_weight * g) / (sqrtf(v) * c.inv_sqrt_correction2 + c.eps);
}

// Rules. kStates: state tensors; kWritten: how many of them, from the first, are written back; kOutput: u goes to an
// output tensor and parameters are left alone. `scale` is one number a tensor.
struct Adam {
  static constexpr int kStates = 2, kWritten = 2;
  static constexpr bool kOutput = false;
  static MOPT_HD float direction(float g, float& m, float& v, float&, float, const Coefficients& c) {
    return adam(g, m, v, c);
  }
};

struct Mars {  // third state: the previous step's gradient; scale: clip coefficient of c
  static constexpr int kStates = 3, kWritten = 3;
  static constexpr bool kOutput = false;
  static MOPT_HD float corrected(float g, float previous, const Coefficients& c) {
    return g + c.gamma * (g - previous);
  }
  static MOPT_HD float direction(float g, float& m, float& v, float& previous, float scale, const Coefficients& c) {
    const float corrected_g = corrected(g, previous, c) * scale;
    previous = g;
    return adam(corrected_g, m, v, c);
  }
};

struct Cautious {  // scale: 1/(mean(mask) + ε)
  static constexpr int kStates = 2, kWritten = 2;
  static constexpr bool kOutput = false;
  // u has the sign of its numerator, so the mask needs no second moment.
  static MOPT_HD bool kept(float g, float m, const Coefficients& c) {
    const float next = c.beta1 * m + c.input_weight1 * g;
    return agree(c.momentum_weight * next + c.gradient_weight * g, g);
  }
  static MOPT_HD float direction(float g, float& m, float& v, float&, float scale, const Coefficients& c) {
    const float mask = kept(g, m, c) ? scale : 0.0f;
    return adam(g, m, v, c) * mask;
  }
};

struct Lion {
  static constexpr int kStates = 1, kWritten = 1;
  static constexpr bool kOutput = false;
  static MOPT_HD float direction(float g, float& m, float&, float&, float, const Coefficients& c) {
    const float u = sign(c.beta1 * m + c.input_weight1 * g);
    m = c.beta2 * m + c.input_weight2 * g;
    return u;
  }
};

struct Signum {
  static constexpr int kStates = 1, kWritten = 1;
  static constexpr bool kOutput = false;
  static MOPT_HD float direction(float g, float& m, float&, float&, float, const Coefficients& c) {
    m = c.beta1 * m + c.input_weight1 * g;
    return sign(c.momentum_weight * m + c.gradient_weight * g);
  }
};

struct Sophia {  // second state: the curvature h, read only
  static constexpr int kStates = 2, kWritten = 1;
  static constexpr bool kOutput = false;
  static MOPT_HD float direction(float g, float& m, float& h, float&, float, const Coefficients& c) {
    m = c.beta1 * m + c.input_weight1 * g;
    const float floor = c.gamma * h;
    const float ratio = c.momentum_weight * m / (floor > c.eps ? floor : c.eps);
    return ratio > 1.0f ? 1.0f : (ratio < -1.0f ? -1.0f : ratio);
  }
};

struct Momentum {  // for matrix optimizers: the direction is an output
  static constexpr int kStates = 1, kWritten = 1;
  static constexpr bool kOutput = true;
  static MOPT_HD float direction(float g, float& m, float&, float&, float, const Coefficients& c) {
    m = c.beta1 * m + c.input_weight1 * g;
    return c.momentum_weight * m + c.gradient_weight * g;
  }
};

struct Apply {  // the "gradient" is a finished direction
  static constexpr int kStates = 0, kWritten = 0;
  static constexpr bool kOutput = false;
  static MOPT_HD float direction(float u, float&, float&, float&, float scale, const Coefficients&) {
    return u * scale;
  }
};

// Adam-mini: a block of elements shares one second moment, of the mean of g². What m is multiplied by to give the direction.
MOPT_HD float block_scale(double squares, int64_t count, float& v, const Coefficients& c) {
  v = c.beta2 * v + c.input_weight2 * static_cast<float>(squares / static_cast<double>(count));
  return c.momentum_weight / (sqrtf(v) * c.inv_sqrt_correction2 + c.eps);
}

// p − (lr·u + decay_factor·p): 1 − decay_factor would lose small decays to rounding. Cautious decay acts where u and p agree.
MOPT_HD float descend(float p, float u, bool cautious_decay, const Coefficients& c) {
  const bool decays = !cautious_decay || u * p >= 0.0f;
  return p - (c.lr * u + (decays ? c.decay_factor : 0.0f) * p);
}

}  // namespace MOPT_ISA
}  // namespace megatron_opt
