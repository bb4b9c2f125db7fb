// Read-only sums over a tensor, three a tensor. Number is what a block of 2048 elements is added up in; blocks are added in
// double.
#pragma once

#include "updates.h"

namespace megatron_opt {
inline namespace MOPT_ISA {

constexpr int kSums = 3;

struct GradientNorm {  // Σg², number of Inf and NaN, 0
  using Number = double;
  static constexpr bool kParam = false, kState = false;
  static MOPT_HD void add(float, float g, float, const Coefficients&, double& a, double& b, double&) {
    a += static_cast<double>(g) * g;
    b += is_finite(g) ? 0.0 : 1.0;
  }
};

struct CautiousMask {  // number of elements that Cautious keeps; state: m
  using Number = float;  // counts up to 2^24 are exact
  static constexpr bool kParam = false, kState = true;
  static MOPT_HD void add(float, float g, float m, const Coefficients& k, float& a, float&, float&) {
    a += Cautious::kept(g, m, k) ? 1.0f : 0.0f;
  }
};

struct MarsNorm {  // Σc²; state: the previous gradient
  using Number = double;
  static constexpr bool kParam = false, kState = true;
  static MOPT_HD void add(float, float g, float previous, const Coefficients& k, double& a, double&, double&) {
    const double c = Mars::corrected(g, previous, k);
    a += c * c;
  }
};

struct Products {  // Σp², Σp·u, Σu²: what the projection of Hyperball needs
  using Number = double;
  static constexpr bool kParam = true, kState = false;
  static MOPT_HD void add(float p, float u, float, const Coefficients&, double& a, double& b, double& c) {
    a += static_cast<double>(p) * p;
    b += static_cast<double>(p) * u;
    c += static_cast<double>(u) * u;
  }
};

}  // namespace MOPT_ISA
}  // namespace megatron_opt
