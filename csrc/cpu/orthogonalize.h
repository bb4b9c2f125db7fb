// Newton–Schulz orthogonalization on CPU: symmetric products at half the work, every matrix in cache.
#pragma once

#include <vector>

#include "product.h"

namespace megatron_opt {

struct Step {
  float a, b, c;  // X ← aX + bXXᵀX + c(XXᵀ)²X
};

struct Orthogonalization {
  const float* in;  // (rows, cols), contiguous; any shape
  float* out;
  int64_t rows, cols;
};

struct NewtonSchulz {
  std::vector<Step> steps;
  double eps;
  bool add_eps;  // divide by ‖X‖ + eps, else by max(‖X‖, eps)
  bool bf16;     // iterate in bf16, else in fp32
  int gram;      // steps on the Gram matrix before it is applied: 1 is the standard form
};

void orthogonalize_cpu(const NewtonSchulz& settings, const std::vector<Orthogonalization>& matrices, int threads);

}  // namespace megatron_opt
